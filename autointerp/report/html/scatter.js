/* Scatter plots of latents, with counts at their edges where asked for. */
"use strict";
(() => {
  const { axis, layout } = Report;
  const BINS = 40;

  /** Counts of `values` in `bins` equal bins from `low` to `high`; what lies outside is in the first or the last. */
  Report.histogram = (values, low, high, bins = BINS) => {
    const counts = new Array(bins).fill(0);
    for (const value of values) {
      const bin = Math.floor(((value - low) / (high - low)) * bins);
      counts[Math.min(bins - 1, Math.max(0, bin))] += 1;
    }
    const step = (high - low) / bins;
    return { middle: counts.map((_, i) => low + (i + 0.5) * step), counts, step };
  };

  function edge(group, values, [low, high], log, vertical, axes) {
    const scaled = log ? values.map(Math.log10) : values;
    const { middle, counts, step } = Report.histogram(scaled, low, high);
    // On a logarithmic axis a bar's width is in the axis's own numbers.
    const at = log ? middle.map((x) => 10 ** x) : middle;
    const width = log ? middle.map((x) => 10 ** (x + step / 2) - 10 ** (x - step / 2)) : step;
    return {
      type: "bar",
      orientation: vertical ? "h" : "v",
      x: vertical ? counts : at,
      y: vertical ? at : counts,
      width,
      marker: { color: group.colour, line: { width: 0 } },
      hoverinfo: "skip",
      showlegend: false,
      ...axes,
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
    const all = groups.flatMap((group) => group.points);
    const n = all.length;
    const type = Report.scatterType(n);
    const size = n > 10_000 ? 3 : n > 2_000 ? 4 : 6;
    const xRange = of.xRange ?? extent(all.map((point) => point.x), of.xLog);
    const yRange = of.yRange ?? extent(all.map((point) => point.y), of.yLog);
    const points = groups.map((group) => ({
      type,
      mode: "markers",
      name: Report.label(`${group.name} (${Report.count(group.points.length)})`),
      x: group.points.map((point) => point.x),
      y: group.points.map((point) => point.y),
      customdata: group.points.map((point) => point.latent),
      marker: {
        color: group.values ?? group.colour,
        size,
        symbol: group.symbol ?? "circle",
        opacity: n > 2_000 ? 0.55 : 0.75,
        line: { width: 0 },
        ...group.marker,
      },
      hoverinfo: "none",
    }));
    const edges = of.edges
      ? groups.flatMap((group) => [
          edge(group, group.points.map((point) => point.x), xRange, of.xLog, false, { xaxis: "x", yaxis: "y2" }),
          edge(group, group.points.map((point) => point.y), yRange, of.yLog, true, { xaxis: "x2", yaxis: "y" }),
        ])
      : [];
    const inside = of.edges ? [0, 0.85] : [0, 1];
    const hidden = { visible: false, domain: [0.87, 1], fixedrange: true };
    return {
      traces: [...points, ...edges, ...(of.more ?? [])],
      layout: layout({
        xaxis: axis(of.x, { domain: inside, range: xRange, ...(of.xLog ? { type: "log", dtick: 1 } : {}) }),
        yaxis: axis(of.y, { domain: inside, range: yRange, ...(of.yLog ? { type: "log", dtick: 1 } : {}) }),
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
})();
