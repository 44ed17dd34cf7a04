/* What each figure shows. A builder returns Plotly's traces and layout, and the table of its data. */
"use strict";
(() => {
  const { axis, colour, figures, group, known, label, layout, line, rule } = Report;
  const CHANCE = 0.5;
  const findings = () => Report.data("findings");
  const columns = () => Report.data("columns");
  const percentAxis = (title, more = {}) => axis(title, { tickformat: ".0%", rangemode: "tozero", ...more });
  const every = () => Array.from({ length: columns().n_latents }, (_, latent) => latent);
  const against = (run) => columns().against.find((sibling) => sibling.run === run) ?? columns().against[0];
  const mean = (a, b) => (a === null || b === null ? null : (a + b) / 2);
  const firing = (latent) => Report.latents().firings(latent) > 0;
  const CLASSES = ["all", "some", "one"];
  const BY_SIMILARITY = { x: "similarity to the partners", xRange: [-0.02, 1.02] };
  const FIRINGS = { y: "firings", yLog: true };
  const SYMBOLS = { one: "diamond", some: "circle", all: "square" };

  /** The latents by shared class. */
  const classGroups = (x, y, latents) => {
    const { classOf } = Report.latents();
    const names = Report.classNames();
    return CLASSES.map((name) =>
      group(names[name], colour(name), latents.filter((latent) => classOf(latent) === name), x, y, { symbol: SYMBOLS[name] }),
    ).filter((one) => one.points.length > 0);
  };

  const vertical = (x, more = {}) => rule({ x0: x, x1: x, yref: "paper", y0: 0, y1: 1 }, more);
  const markers = (size, symbol) => ({ mode: "lines+markers", marker: { size, symbol } });

  /** Bars from the lower to the upper bound of each value; none where it has no interval. */
  const errorBars = (values, intervals, hue, more = {}) => ({
    type: "data", symmetric: false, color: hue, thickness: 1.2, width: 3,
    array: values.map((value, i) => (intervals[i] ? intervals[i][1] - value : 0)),
    arrayminus: values.map((value, i) => (intervals[i] ? value - intervals[i][0] : 0)),
    ...more,
  });

  const chanceLine = (name, x, y, more = {}, dash = "dash") =>
    line(name, x, y, colour("control"), { line: { color: colour("control"), width: 1.5, dash }, ...more });

  // --- overlap ------------------------------------------------------------------------------------------------

  figures.sweep = () => {
    const tree = findings().overlap;
    const { sweep } = tree;
    const hues = { strict: "all", both: "some", decoder: "one", lenient: "q2" };
    const dashes = { strict: "solid", both: "longdash", decoder: "solid", lenient: "dot" };
    const names = Object.keys(hues);
    const own = names.map((name) => line(name, sweep.threshold, sweep[name], colour(hues[name]), {
      line: { color: colour(hues[name]), width: name === tree.definition ? 3 : 2, dash: dashes[name] },
    }));
    const chance = Object.entries(tree.nulls).map(([name, of]) => chanceLine(`decoder, ${name}`, sweep.threshold, of.sweep.decoder));
    const nulls = Object.keys(tree.nulls);
    return {
      traces: [...own, ...chance],
      layout: layout({
        xaxis: axis("cosine that is asked for", { range: [0, 1] }),
        yaxis: percentAxis("shared, of alive latents", { range: [0, 1.02] }),
        shapes: [vertical(tree.threshold)],
      }),
      table: {
        head: ["threshold", ...names, ...nulls.map((name) => `decoder, ${name}`)],
        rows: sweep.threshold.map((at, i) => [at, ...names.map((name) => sweep[name][i]), ...nulls.map((name) => tree.nulls[name].sweep.decoder[i])]),
      },
    };
  };

  figures.growth = () => {
    const tree = findings().overlap;
    const of = tree[tree.definition];
    const n = tree.only_one.map((_, i) => i + 1);
    const one = (name, key, hue) => line(name, n.slice(1), tree[key].slice(1), colour(hue), {
      ...markers(7, hue === "one" ? "diamond" : "square"),
      error_y: errorBars(tree[key].slice(1), of[`${key}_intervals`].slice(1), colour(hue)),
    });
    const chance = Object.entries(tree.nulls).flatMap(([name, by]) => ["only_one", "all_of_n"].map((key) =>
      chanceLine(`${key === "only_one" ? "one alone" : "every one"}, ${name}`, n.slice(1), by[key].slice(1), { showlegend: false })));
    return {
      traces: [one("found in one alone", "only_one", "one"), one("found in every one", "all_of_n", "all"), ...chance],
      layout: layout({
        xaxis: axis("SAEs compared", { dtick: 1, range: [1.7, n.length + 0.3] }),
        yaxis: percentAxis("of alive latents", { range: [0, 1.02] }),
      }),
      table: {
        head: ["SAEs", "one alone", "low", "high", "every one", "low", "high"],
        rows: n.map((i) => [i, ...["only_one", "all_of_n"].flatMap((key) => [tree[key][i - 1], ...(of[`${key}_intervals`][i - 1] ?? [null, null])])]),
      },
    };
  };

  figures.pairs = () => {
    const tree = findings().overlap;
    const { pairs, pairs_null: chance } = tree[tree.definition];
    const names = [...new Set(Object.keys(pairs).flatMap((pair) => pair.split("--")))];
    const value = (a, b) => pairs[`${a}--${b}`] ?? pairs[`${b}--${a}`] ?? null;
    const z = names.map((a) => names.map((b) => value(a, b)));
    const texts = z.map((row) => row.map((cell) => (cell === null ? "" : Report.percent(cell))));
    return {
      traces: [{
        type: "heatmap", z, x: names.map(label), y: names.map(label), text: texts, texttemplate: "%{text}", xgap: 2, ygap: 2,
        colorscale: [[0, colour("accent-soft")], [1, colour("all")]], showscale: false, hoverongaps: false,
        hovertemplate: "%{y} and %{x}: %{z:.1%}<extra></extra>",
      }],
      layout: layout({ xaxis: axis("", { showgrid: false }), yaxis: axis("", { autorange: "reversed", showgrid: false }) }),
      table: {
        head: ["pair", "shared", ...Object.keys(chance)],
        rows: Object.entries(pairs).map(([pair, of]) => [pair, of, ...Object.values(chance).map((null_) => null_[pair])]),
      },
    };
  };

  figures.width = (name) => {
    const sweep = columns().sweeps.find((of) => of.name === name) ?? columns().sweeps[0];
    const points = [...sweep.points].sort((a, b) => (a.at > b.at) - (a.at < b.at));
    const numeric = points.every((point) => Report.known(point.at) && point.at > 0);
    const at = points.map((point) => (numeric ? point.at : label(String(point.at))));
    const values = (key) => points.map((point) => point[key].value);
    const series = (key, said, hue, symbol) => line(said, at, values(key), colour(hue), {
      ...markers(8, symbol),
      error_y: errorBars(values(key), points.map((point) => point[key].interval), colour(hue)),
    });
    const chance = (key, dash) => chanceLine(`${key} by chance`, at, points.map((point) => point[key].chance), { showlegend: false }, dash);
    const words = sweep.axis.split(".").at(-1).replaceAll("_", " ");
    return {
      traces: [series("both", "both cosines above the threshold", "all", "square"), series("lenient", "same partner", "one", "diamond"), chance("both", "dash"), chance("lenient", "dot")],
      layout: layout({
        xaxis: axis(label(words), numeric ? { type: "log", tickvals: at, ticktext: at.map(Report.count) } : { type: "category" }),
        yaxis: percentAxis("of alive latents", { range: [0, 1.02] }),
      }),
      table: {
        head: ["point", words, ...["both", "same partner"].flatMap((said) => [said, "low", "high", `${said} by chance`])],
        rows: points.map((point) => [point.name, point.at, ...["both", "lenient"].flatMap((key) => [point[key].value, ...(point[key].interval ?? [null, null]), point[key].chance])]),
      },
    };
  };

  figures.cosines = (run) => {
    const of = against(run);
    const { threshold } = columns();
    const alive = every().filter((latent) => columns().latents.n_firings === null || firing(latent));
    const same = (latent) => of.encoder_partner[latent] === of.decoder_partner[latent];
    const [x, y] = [(latent) => of.decoder_cosine[latent], (latent) => of.encoder_cosine[latent]];
    return Report.scatter(
      [
        group("same partner", colour("all"), alive.filter(same), x, y),
        group("different partners", colour("one"), alive.filter((latent) => !same(latent)), x, y, { symbol: "diamond" }),
      ],
      {
        x: "decoder cosine", y: "encoder cosine", edges: true, xRange: [-0.05, 1.02], yRange: [-0.05, 1.02],
        shapes: [
          rule({ x0: threshold, x1: threshold, y0: -0.05, y1: 1.02 }),
          rule({ y0: threshold, y1: threshold, x0: -0.05, x1: 1.02 }),
        ],
      },
    );
  };

  figures.similarity = () => {
    const shape = findings().similarity.histogram;
    const { threshold } = columns();
    const middle = shape.counts.map((_, i) => (shape.edges[i] + shape.edges[i + 1]) / 2);
    const bar = (name, y, hue) => ({
      type: "bar", name, x: middle, y, marker: { color: colour(hue), line: { color: colour("card"), width: 1 } },
      hovertemplate: "%{y:,} at %{x}<extra>%{fullData.name}</extra>",
    });
    const nulls = Object.entries(shape.null);
    const chance = nulls.map(([name, of]) => line(`by chance, ${name}`, middle, of.counts, colour("control"), {
      line: { color: colour("control"), width: 1.5, shape: "hvh" },
    }));
    return {
      traces: [bar("same partner", shape.same_partner, "all"), bar("different partners", shape.different_partner, "one"), ...chance],
      layout: layout({
        barmode: "stack",
        xaxis: axis("mean of encoder and decoder cosine", { range: [-0.05, 1] }),
        yaxis: axis("latents", { range: [0, 1.15 * Math.max(...shape.counts)] }),
        shapes: [vertical(threshold)],
      }),
      table: {
        head: ["from", "to", "same partner", "different partners", ...nulls.map(([name]) => `by chance, ${name}`)],
        rows: middle.map((_, i) => [shape.edges[i], shape.edges[i + 1], shape.same_partner[i], shape.different_partner[i], ...nulls.map(([, of]) => of.counts[i])]),
      },
    };
  };

  figures.nearest = (run) => {
    const of = against(run);
    const x = (latent) => mean(of.max_encoder_cosine[latent], of.max_decoder_cosine[latent]);
    const y = (latent) => mean(of.encoder_cosine[latent], of.decoder_cosine[latent]);
    return Report.scatter(classGroups(x, y, every()), {
      x: "cosine with the nearest", y: "cosine with the matched partner", xRange: [0, 1.02], yRange: [-0.05, 1.02],
      shapes: [rule({ x0: 0, y0: 0, x1: 1, y1: 1 })],
    });
  };

  // --- where they are found, how often they fire -----------------------------------------------------------------

  figures.membership = () => {
    const { parts } = findings().membership;
    const between = [colour("some"), colour("q1"), colour("q0"), colour("q2")];
    const hue = (part, i) => (part.shared_class === "some" ? between[(i - 1) % between.length] : colour(part.shared_class));
    const texts = parts.map((part) => label(part.label));
    return {
      traces: [{
        type: "pie", hole: 0.58, sort: false, direction: "clockwise", labels: texts, values: parts.map((part) => part.n),
        marker: { colors: parts.map(hue), line: { color: colour("card"), width: 2 } }, textinfo: "label+percent",
        textposition: "outside", hovertemplate: "%{label}: %{value:,} latents<extra></extra>",
      }],
      layout: layout({ showlegend: false, margin: { l: 110, r: 110, t: 36, b: 36 } }),
      table: {
        head: ["found", "latents", "of alive", ...Object.keys(parts[0].null).map((name) => `by chance, ${name}`)],
        rows: parts.map((part) => [part.label, part.n, part.fraction, ...Object.values(part.null)]),
      },
    };
  };

  figures.frequency = () => {
    const { firings, similarity } = Report.latents();
    return Report.scatter(classGroups(similarity, firings, every().filter(firing)), { ...BY_SIMILARITY, ...FIRINGS, edges: true });
  };

  figures.quartiles = () => {
    const { firings, similarity, score } = Report.latents();
    const [a, b, c] = findings().scores.quartiles;
    const quarter = (latent) => [a, b, c].filter((edge) => score(latent) >= edge).length;
    const scored = columns().scored.latent.filter(firing);
    const names = [`below ${Report.decimal(a)}`, `to ${Report.decimal(b)}`, `to ${Report.decimal(c)}`, "above"];
    const groups = names.map((name, i) =>
      group(`score ${name}`, colour(`q${i}`), scored.filter((latent) => quarter(latent) === i), similarity, firings));
    return Report.scatter(groups, { ...BY_SIMILARITY, ...FIRINGS, edges: true });
  };

  figures.training = () => {
    const { curves } = findings().training;
    const hues = ["all", "one", "some", "q2", "control"];
    const dashes = ["solid", "dash", "dot", "longdash", "dashdot"];
    return {
      traces: Object.entries(curves).map(([name, of], i) => line(name, of.tokens, of.fvu, colour(hues[i % hues.length]), {
        line: { color: colour(hues[i % hues.length]), width: 1.8, dash: dashes[i % dashes.length] },
      })),
      layout: layout({ xaxis: axis("tokens"), yaxis: axis("FVU", { type: "log", tickformat: ".2~g", nticks: 6 }) }),
      table: {
        head: ["run", "step", "tokens", "FVU", "loss", "L0", "dead", "learning rate"],
        rows: Object.entries(curves).flatMap(([name, of]) =>
          of.step.map((step, i) => [name, step, of.tokens[i], of.fvu[i], of.loss[i], of.l0[i], of.dead_fraction[i], of.learning_rate[i]])),
      },
    };
  };

  // --- scores -------------------------------------------------------------------------------------------------

  const guessing = () => rule({ xref: "paper", x0: 0, x1: 1, y0: CHANCE, y1: CHANCE });
  const scores = () => ({ y: "balanced accuracy", yRange: scoreRange(columns().scored.score), shapes: [guessing()] });

  function scoreRange(values) {
    const low = values.reduce((least, value) => Math.min(least, value), CHANCE);
    return [Math.floor(low * 20) / 20 - 0.03, 1.03];
  }

  /** The controls that the scores are compared with, as {name, counts}: the swapped control first. */
  function controlsOf(tree) {
    const names = { frozen: "frozen decoder", untrained: "untrained SAE" };
    const saes = (tree.control_saes ?? []).map((row) => [names[row.kind] ?? row.kind, row]);
    const all = [["swapped control", tree.control], ...saes, ["n-gram baseline", tree.baseline]];
    return all.filter(([, row]) => row?.histogram).map(([name, row]) => ({ name, counts: row.histogram.counts }));
  }

  figures.scores = () => {
    const tree = findings().scores;
    const { edges, counts } = tree.histogram;
    const controls = controlsOf(tree);
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
        shapes: [vertical(CHANCE, { layer: "above" })],
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

  figures.relation = () => {
    const { similarity, score } = Report.latents();
    const { bins } = findings().relation;
    const at = bins.map((bin) => (bin.low + bin.high) / 2);
    const means = {
      type: "scatter", mode: "markers", name: "mean of a quarter", x: at, y: bins.map((bin) => bin.mean),
      error_y: errorBars(bins.map((bin) => bin.mean), bins.map((bin) => bin.interval), colour("ink"), { thickness: 1.5, width: 4 }),
      marker: { symbol: "diamond", size: 11, color: colour("ink"), line: { color: colour("card"), width: 1.5 } },
      hovertemplate: "mean %{y:.3f}<extra></extra>",
    };
    return Report.scatter(classGroups(similarity, score, columns().scored.latent), { ...BY_SIMILARITY, ...scores(), more: [means] });
  };

  figures.score_frequency = () => {
    const { firings, score } = Report.latents();
    const alive = (latent) => (firings(latent) > 0 ? firings(latent) : null);
    return Report.scatter(classGroups(alive, score, columns().scored.latent), { x: "firings", xLog: true, ...scores() });
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
