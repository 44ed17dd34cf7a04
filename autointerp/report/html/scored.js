/* What each figure about scores shows; see figures.js. */
"use strict";
(() => {
  const { axis, colour, figures, known, layout, rule } = Report;
  const CHANCE = 0.5;
  const findings = () => Report.data("findings");
  const columns = () => Report.data("columns");
  const guessing = (more = {}) => rule({ xref: "paper", x0: 0, x1: 1, y0: CHANCE, y1: CHANCE }, more);

  function scoreRange(values) {
    const low = values.reduce((least, value) => Math.min(least, value), CHANCE);
    return [Math.floor(low * 20) / 20 - 0.03, 1.03];
  }

  /** Whatever the scores are held against, as {name, counts}: the swapped control first. */
  function heldAgainst(tree) {
    const names = { frozen: "frozen decoder", untrained: "untrained SAE" };
    return [
      ["swapped control", tree.control],
      ...(tree.control_saes ?? []).map((row) => [names[row.kind] ?? row.kind, row]),
      ["n-gram baseline", tree.baseline],
    ]
      .filter(([, row]) => row?.histogram)
      .map(([name, row]) => ({ name, counts: row.histogram.counts }));
  }

  figures.scores = () => {
    const tree = findings().scores;
    const { edges, counts } = tree.histogram;
    const controls = heldAgainst(tree);
    const middle = counts.map((_, i) => (edges[i] + edges[i + 1]) / 2);
    const filled = counts.findIndex((count, i) => count + controls.reduce((sum, of) => sum + of.counts[i], 0) > 0);
    // Of as many latents as each has: they are not equally many.
    const share = (of) => {
      const n = of.reduce((sum, count) => sum + count, 0);
      return of.map((count) => count / n);
    };
    const said = (of) => of.map((count, i) => [count, share(of)[i]]);
    const template = "%{customdata[0]:,} latents (%{customdata[1]:.1%}) at %{x}<extra>%{fullData.name}</extra>";
    const bar = (name, y, hue, of) => ({
      type: "bar", name, x: middle, y, customdata: said(of), hovertemplate: template,
      marker: { color: colour(hue), line: { color: colour("card"), width: 1 } },
    });
    const dashes = ["solid", "dash", "dot"];
    const below = controls.map(({ name, counts: of }, i) => {
      const y = share(of).map((part) => -part);
      if (i === 0) return bar(name, y, "control", of);
      const hue = colour(["one", "some", "q2"][i - 1] ?? "ink");
      return Report.line(name, middle, y, hue, { customdata: said(of), hovertemplate: template, line: { color: hue, width: 2, shape: "hvh", dash: dashes[i - 1] } });
    });
    const most = Math.max(...share(counts));
    const least = Math.max(0, ...controls.flatMap((of) => share(of.counts)));
    const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((one) => (most + least) / one <= 7) ?? 1;
    const ticks = Array.from({ length: 41 }, (_, i) => (i - 20) * step).filter((at) => at <= most && at >= -least);
    return {
      traces: [bar("own explanation", share(counts), "all", counts), ...below],
      layout: layout({
        barmode: "relative",
        xaxis: axis("balanced accuracy", { range: [Math.min(CHANCE - 0.1, edges[Math.max(0, filled)]) - 0.01, 1.01], dtick: 0.1 }),
        yaxis: axis("share of the latents", { zeroline: true, tickvals: ticks, ticktext: ticks.map((at) => `${Math.round(100 * Math.abs(at))}%`) }),
        shapes: [rule({ x0: CHANCE, x1: CHANCE, yref: "paper", y0: 0, y1: 1 }, { layer: "above" })],
        annotations: [{ x: CHANCE, yref: "paper", y: 0, yanchor: "bottom", xanchor: "left", xshift: 4, text: "guessing", showarrow: false, font: { size: 11 } }],
      }),
      table: {
        head: ["from", "to", "own explanation", ...controls.map((of) => of.name)],
        rows: counts.map((count, i) => [edges[i], edges[i + 1], count, ...controls.map((of) => of.counts[i])]),
      },
    };
  };

  figures.by_number = () => {
    const { shared, score } = Report.latents();
    const n = columns().against.length;
    const latents = columns().scored.latent.filter((latent) => known(shared(latent)));
    const counts = Array.from({ length: n + 1 }, (_, i) => i);
    const hue = (i) => (i === 0 ? "one" : i === n ? "all" : "some");
    return {
      traces: counts.map((i) => {
        const of = latents.filter((latent) => shared(latent) === i);
        return {
          type: "box", name: `${i} (${of.length})`, y: of.map(score), customdata: of, boxpoints: "outliers",
          marker: { color: colour(hue(i)), size: 5 }, line: { width: 1.5 }, hoveron: "boxes+points", hoverinfo: "y",
        };
      }),
      layout: layout({
        showlegend: false,
        xaxis: axis("other SAEs that share the latent (latents)", { showgrid: false }),
        yaxis: axis("balanced accuracy", { range: scoreRange(columns().scored.score) }),
        shapes: [guessing()],
      }),
      table: { head: ["latent", "shared with", "score"], rows: latents.map((latent) => [latent, shared(latent), score(latent)]) },
    };
  };

  const classGroups = (x, y) => Report.classGroups(x, y, columns().scored.latent);

  figures.relation = () => {
    const { similarity, score } = Report.latents();
    const { bins } = findings().relation;
    const at = bins.map((bin) => (bin.low + bin.high) / 2);
    const means = {
      type: "scatter", mode: "markers", name: "mean of a quarter", x: at, y: bins.map((bin) => bin.mean),
      error_y: {
        type: "data", symmetric: false, color: colour("ink"), thickness: 1.5, width: 4,
        array: bins.map((bin) => (bin.interval ? bin.interval[1] - bin.mean : 0)),
        arrayminus: bins.map((bin) => (bin.interval ? bin.mean - bin.interval[0] : 0)),
      },
      marker: { symbol: "diamond", size: 11, color: colour("ink"), line: { color: colour("card"), width: 1.5 } },
      hovertemplate: "mean %{y:.3f}<extra></extra>",
    };
    return Report.scatter(classGroups(similarity, score), {
      x: "similarity to the partners", y: "balanced accuracy", yRange: scoreRange(columns().scored.score), xRange: [-0.02, 1.02],
      shapes: [guessing()], more: [means],
    });
  };

  figures.score_frequency = () => {
    const { firings, score } = Report.latents();
    const alive = (latent) => (firings(latent) > 0 ? firings(latent) : null);
    return Report.scatter(classGroups(alive, score), {
      x: "firings", y: "balanced accuracy", xLog: true, yRange: scoreRange(columns().scored.score), shapes: [guessing()],
    });
  };

  figures.partners = (run) => {
    const pairs = columns().partners.find((of) => of.run === run) ?? columns().partners[0];
    const range = scoreRange([...pairs.score, ...pairs.partner_score]);
    const points = pairs.latent.map((latent, i) => ({ latent, x: pairs.score[i], y: pairs.partner_score[i] }));
    const shade = {
      values: pairs.similarity,
      marker: {
        cmin: 0, cmax: 1, colorscale: [[0, colour("one")], [0.5, colour("none")], [1, colour("all")]], opacity: 0.8,
        colorbar: { title: { text: "similarity", side: "right" }, thickness: 10, outlinewidth: 0, len: 0.8 },
      },
    };
    const made = Report.scatter([{ name: "pairs", colour: colour("all"), points, ...shade }], {
      x: `score in ${Report.label(columns().run)}`, y: `score of the partner in ${Report.label(pairs.run)}`,
      xRange: range, yRange: range, shapes: [rule({ x0: range[0], y0: range[0], x1: range[1], y1: range[1] })],
      layout: { showlegend: false },
    });
    return {
      ...made,
      table: {
        head: ["latent", "partner", "score", "score of the partner", "similarity"],
        rows: pairs.latent.map((latent, i) => [latent, pairs.partner[i], pairs.score[i], pairs.partner_score[i], pairs.similarity[i]]),
      },
    };
  };
})();
