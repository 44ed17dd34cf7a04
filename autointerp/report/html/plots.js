/* Figures: drawn by Plotly when they come near the window, drawn again in other colours or for another choice, and each
   with its data as a table and as a file; scatter plots of latents. What they show is in figures.js. */
"use strict";
(() => {
  const { element, colour, decimal, interval, rate } = Report;
  const FONT = '13px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif';
  const SHOWN_ROWS = 200;
  const ON_PAPER = 640; // pixels, the width of a figure on A4 or Letter
  const drawn = new Set();
  let printing = false;
  Report.figures = {};

  /** Plotly reads a little HTML in its labels: what is not ours is kept from being read so. */
  Report.label = (text) =>
    Report.visible(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  Report.axis = (title, more = {}) => ({
    title: { text: title, standoff: 8, font: { size: 12.5 } },
    gridcolor: colour("grid"),
    linecolor: colour("line"),
    zerolinecolor: colour("line"),
    zeroline: false,
    ticks: "outside",
    tickcolor: colour("line"),
    ticklen: 4,
    automargin: true,
    fixedrange: false,
    ...more,
  });

  Report.layout = (more = {}) => ({
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: FONT.slice(5), size: 12, color: colour("quiet") },
    margin: { l: 48, r: 12, t: 10, b: 44 },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12.5 } },
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 11.5 }, traceorder: "normal" },
    hovermode: "closest",
    dragmode: "zoom",
    bargap: 0,
    ...more,
  });

  Report.line = (name, x, y, hue, more = {}) => ({
    type: "scatter",
    mode: "lines",
    name: Report.label(name),
    x,
    y,
    line: { color: hue, width: 2 },
    hovertemplate: `%{y} at %{x}<extra>${Report.label(name)}</extra>`,
    ...more,
  });

  /** A straight line through the whole figure: a threshold, guessing, a diagonal. */
  Report.rule = (where, more = {}) =>
    ({ type: "line", line: { color: colour("quiet"), width: 1, dash: "dot" }, layer: "below", ...where, ...more });

  const hasWebGl = Report.once(() => Boolean(document.createElement("canvas").getContext("webgl")));

  // --- scatter plots of latents, with counts at their edges if wanted ----------------------------------------------

  const BINS = 40;

  /** Counts of `values` in equal bins from `low` to `high`, outliers in the first or the last, as bars along an axis. */
  function edge(group, values, [low, high], log, vertical, axes) {
    const step = (high - low) / BINS;
    const counts = new Array(BINS).fill(0);
    for (const value of values) {
      const bin = Math.floor((((log ? Math.log10(value) : value) - low) / (high - low)) * BINS);
      counts[Math.min(BINS - 1, Math.max(0, bin))] += 1;
    }
    const middle = counts.map((_, i) => low + (i + 0.5) * step);
    // On a logarithmic axis a bar's width is in the axis's own numbers.
    const at = log ? middle.map((x) => 10 ** x) : middle;
    const width = log ? middle.map((x) => 10 ** (x + step / 2) - 10 ** (x - step / 2)) : step;
    return {
      type: "bar", marker: { color: group.colour, line: { width: 0 } }, hoverinfo: "skip", showlegend: false,
      ...(vertical ? { orientation: "h", x: counts, y: at } : { orientation: "v", x: at, y: counts }), width, ...axes,
    };
  }

  const extent = (values, log) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      const at = log ? Math.log10(value) : value;
      low = Math.min(low, at);
      high = Math.max(high, at);
    }
    const room = (high - low || 1) * 0.03;
    return [low - room, high + room];
  };

  /**
   * Groups of latents as points.
   * @param groups {name, colour, points: [{latent, x, y}], symbol}
   * @param of {x: title, y: title, xLog, yLog, xRange, yRange, edges: whether to count at the edges, shapes, more traces}
   */
  Report.scatter = (groups, of) => {
    const [xs, ys] = ["x", "y"].map((name) => (group) => group.points.map((point) => point[name]));
    const n = groups.reduce((sum, group) => sum + group.points.length, 0);
    const type = n > 3000 && hasWebGl() ? "scattergl" : "scatter";
    const size = n > 10_000 ? 3 : n > 2_000 ? 4 : 6;
    const xRange = of.xRange ?? extent(groups.flatMap(xs), of.xLog);
    const yRange = of.yRange ?? extent(groups.flatMap(ys), of.yLog);
    const points = groups.map((group) => ({
      type,
      mode: "markers",
      name: Report.label(`${group.name} (${Report.count(group.points.length)})`),
      x: xs(group),
      y: ys(group),
      customdata: group.points.map((point) => point.latent),
      marker: {
        color: group.values ?? group.colour, size, symbol: group.symbol ?? "circle",
        opacity: n > 2_000 ? 0.55 : 0.75, line: { width: 0 }, ...group.marker,
      },
      hoverinfo: "none",
    }));
    const edges = of.edges
      ? groups.flatMap((group) => [
          edge(group, xs(group), xRange, of.xLog, false, { xaxis: "x", yaxis: "y2" }),
          edge(group, ys(group), yRange, of.yLog, true, { xaxis: "x2", yaxis: "y" }),
        ])
      : [];
    const inside = of.edges ? [0, 0.85] : [0, 1];
    const hidden = { visible: false, domain: [0.87, 1], fixedrange: true };
    return {
      traces: [...points, ...edges, ...(of.more ?? [])],
      layout: Report.layout({
        xaxis: Report.axis(of.x, { domain: inside, range: xRange, ...(of.xLog ? { type: "log", dtick: 1 } : {}) }),
        yaxis: Report.axis(of.y, { domain: inside, range: yRange, ...(of.yLog ? { type: "log", dtick: 1 } : {}) }),
        ...(of.edges ? { xaxis2: hidden, yaxis2: hidden, barmode: "stack" } : {}),
        shapes: of.shapes ?? [],
        ...(of.layout ?? {}),
      }),
      table: {
        head: ["latent", of.x, of.y, "group"],
        rows: groups.flatMap((group) => group.points.map((point) => [point.latent, point.x, point.y, group.name])),
      },
    };
  };

  /** A group of the latents for which both coordinates are known. */
  Report.group = (name, colour, latents, x, y, more = {}) => ({
    name,
    colour,
    points: latents.map((latent) => ({ latent, x: x(latent), y: y(latent) })).filter((p) => Report.known(p.x) && Report.known(p.y)),
    ...more,
  });

  // --- the tip ------------------------------------------------------------------------------------------------

  const tip = document.getElementById("tip");

  function describe(latent) {
    const latents = Report.latents();
    const kind = latents.classOf(latent);
    const facts = [
      kind === null ? null : Report.classNames()[kind],
      latents.similarity(latent) === null ? null : `similarity ${decimal(latents.similarity(latent), 2)}`,
      latents.score(latent) === null
        ? null
        : `score ${decimal(latents.score(latent), 2)} ${interval(latents.low(latent), latents.high(latent))}`,
      latents.frequency(latent) === null ? null : `fires ${rate(latents.frequency(latent))}`,
    ];
    const explanation = latents.explanation(latent);
    return [
      element("strong", {}, `latent ${latent}`),
      facts.filter((fact) => fact !== null).join(" · "),
      explanation === null ? null : element("p", {}, Report.foreign(explanation.length > 240 ? `${explanation.slice(0, 240)}…` : explanation)),
    ];
  }

  function showTip(latent, event) {
    tip.replaceChildren(...describe(latent).filter((part) => part !== null));
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16;
    const top = Math.min(Math.max(8, event.clientY - height / 2), innerHeight - height - 8);
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${top}px`;
  }

  const hideTip = () => {
    tip.hidden = true;
  };

  // --- drawing ------------------------------------------------------------------------------------------------

  const choiceOf = (figure) => figure.querySelector("[data-choice]")?.value ?? null;
  const made = (figure) => Report.figures[figure.dataset.figure](choiceOf(figure));

  async function draw(figure) {
    const plot = figure.querySelector(".plot");
    const { traces, layout } = made(figure);
    if (printing) layout.width = ON_PAPER;
    const first = !drawn.has(figure);
    drawn.add(figure);
    await Plotly.react(plot, traces, layout, {
      displaylogo: false,
      responsive: true,
      modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
      toImageButtonOptions: { filename: figure.dataset.figure, scale: 2 },
    });
    figure.dataset.drawn = "";
    if (!first) return;
    const latentOf = (event) => event.points.map((point) => point.customdata).find(Number.isInteger);
    plot.on("plotly_hover", (event) => {
      const latent = latentOf(event);
      if (latent !== undefined) showTip(latent, event.event);
    });
    plot.on("plotly_unhover", hideTip);
    plot.on("plotly_click", (event) => {
      const latent = latentOf(event);
      hideTip();
      if (latent !== undefined) location.hash = `latent=${latent}`;
    });
  }

  function undraw(figure) {
    if (!drawn.delete(figure)) return;
    delete figure.dataset.drawn;
    Plotly.purge(figure.querySelector(".plot"));
  }

  /** The data of a figure, as a table of its first rows and a button that saves all of them. */
  function tabulate(figure) {
    const { head, rows } = made(figure).table;
    const shown = rows.slice(0, SHOWN_ROWS);
    const written = (value) =>
      value === null || value === undefined ? "–" : typeof value === "string" ? Report.foreign(value) : `${value}`;
    const save = element("button", { type: "button" }, `Save ${Report.count(rows.length)} rows as CSV`);
    save.addEventListener("click", () => Report.saveCsv(figure.dataset.figure, head, rows));
    const heads = head.map((name) => element("th", { scope: "col" }, Report.visible(name)));
    const table = Report.table("data of the figure", heads, shown.map((row) => row.map((value) => element("td", {}, written(value)))));
    const rest = rows.length > shown.length ? element("p", {}, `The first ${SHOWN_ROWS} rows; the file has all.`) : null;
    figure.querySelector("[data-table]").replaceChildren(
      ...[element("p", {}, save), table, rest].filter((part) => part !== null),
    );
  }

  Report.redraw = () => Promise.all([...drawn].map(draw));

  /** Every figure, as wide as a sheet allows, for as long as it is printed. */
  Report.print = (begins) => {
    printing = begins;
    const figures = begins ? document.querySelectorAll("[data-figure]") : drawn;
    return Promise.all([...figures].map(draw));
  };

  Report.watchFigures = () => {
    const near = new IntersectionObserver(
      (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
      { rootMargin: "400px 0px" },
    );
    // A browser holds some sixteen WebGL contexts, so figures far from the window give theirs back.
    const far = new IntersectionObserver(
      (entries) =>
        entries.filter((entry) => !entry.isIntersecting).forEach((entry) => {
          if (entry.target.querySelector("canvas") !== null) undraw(entry.target);
        }),
      { rootMargin: "2500px 0px" },
    );
    for (const figure of document.querySelectorAll("[data-figure]")) {
      near.observe(figure);
      far.observe(figure);
      figure.querySelector("[data-choice]")?.addEventListener("change", () => {
        if (drawn.has(figure)) draw(figure);
        if (figure.querySelector("details").open) tabulate(figure);
      });
      figure.querySelector("details").addEventListener("toggle", (event) => {
        if (event.target.open) tabulate(figure);
      });
    }
    addEventListener("scroll", hideTip, { passive: true });
  };
})();
