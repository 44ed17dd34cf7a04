/* What each figure shows. A builder returns Plotly's traces and layout, and the table of its data. */
"use strict";
(() => {
  const { axis, colour, figures, group, label, layout, line, rule } = Report;
  const findings = () => Report.data("findings");
  const columns = () => Report.data("columns");
  const percentAxis = (title, more = {}) => axis(title, { tickformat: ".0%", rangemode: "tozero", ...more });
  const every = () => Array.from({ length: columns().n_latents }, (_, latent) => latent);
  const against = (run) => columns().against.find((sibling) => sibling.run === run) ?? columns().against[0];
  const mean = (a, b) => (a === null || b === null ? null : (a + b) / 2);
  const firing = (latent) => Report.latents().firings(latent) > 0;
  const CLASSES = ["all", "some", "one"];
  const SYMBOLS = { one: "diamond", some: "circle", all: "square" };

  /** The latents by shared class. */
  const classGroups = (x, y, latents) => {
    const { classOf } = Report.latents();
    const names = Report.classNames();
    return CLASSES.map((name) =>
      group(names[name], colour(name), latents.filter((latent) => classOf(latent) === name), x, y, { symbol: SYMBOLS[name] }),
    ).filter((one) => one.points.length > 0);
  };
  Report.classGroups = classGroups;

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
    const chance = Object.entries(tree.nulls).map(([name, of]) => line(`decoder, ${name}`, sweep.threshold, of.sweep.decoder, colour("control"), {
      line: { color: colour("control"), width: 1.5, dash: name === "rotated" ? "dash" : "dot" },
    }));
    const nulls = Object.keys(tree.nulls);
    return {
      traces: [...own, ...chance],
      layout: layout({
        xaxis: axis("cosine that is asked for", { range: [0, 1] }),
        yaxis: percentAxis("shared, of alive latents", { range: [0, 1.02] }),
        shapes: [rule({ x0: tree.threshold, x1: tree.threshold, yref: "paper", y0: 0, y1: 1 })],
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
    const bars = (values, bounds, hue) => ({
      type: "data",
      symmetric: false,
      array: values.map((value, i) => (bounds[i] ? bounds[i][1] - value : 0)),
      arrayminus: values.map((value, i) => (bounds[i] ? value - bounds[i][0] : 0)),
      color: hue,
      thickness: 1.2,
      width: 3,
    });
    const one = (name, key, hue) => line(name, n.slice(1), tree[key].slice(1), colour(hue), {
      mode: "lines+markers",
      marker: { size: 7, symbol: hue === "one" ? "diamond" : "square" },
      error_y: bars(tree[key].slice(1), of[`${key}_intervals`].slice(1), colour(hue)),
    });
    const chance = Object.entries(tree.nulls).flatMap(([null_, of_]) => ["only_one", "all_of_n"].map((key) =>
      line(`${key === "only_one" ? "one alone" : "every one"}, ${null_}`, n.slice(1), of_[key].slice(1), colour("control"), {
        line: { color: colour("control"), width: 1.5, dash: null_ === "rotated" ? "dash" : "dot" },
        showlegend: false,
      })));
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
    const series = (key, said, hue, symbol) => line(said, at, points.map((point) => point[key].value), colour(hue), {
      mode: "lines+markers",
      marker: { size: 8, symbol },
      error_y: {
        type: "data", symmetric: false, color: colour(hue), thickness: 1.2, width: 3,
        array: points.map(({ [key]: of }) => (of.interval ? of.interval[1] - of.value : 0)),
        arrayminus: points.map(({ [key]: of }) => (of.interval ? of.value - of.interval[0] : 0)),
      },
    });
    const chance = (key) => line(`${key} by chance`, at, points.map((point) => point[key].chance), colour("control"), {
      line: { color: colour("control"), width: 1.5, dash: key === "both" ? "dash" : "dot" }, showlegend: false,
    });
    const words = sweep.axis.split(".").at(-1).replaceAll("_", " ");
    return {
      traces: [series("both", "both cosines above the threshold", "all", "square"), series("lenient", "same partner", "one", "diamond"), chance("both"), chance("lenient")],
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
      line: { color: colour("control"), width: 1.5, shape: "hvh", dash: name === "rotated" ? "solid" : "dot" },
    }));
    return {
      traces: [bar("same partner", shape.same_partner, "all"), bar("different partners", shape.different_partner, "one"), ...chance],
      layout: layout({
        barmode: "stack",
        xaxis: axis("mean of encoder and decoder cosine", { range: [-0.05, 1] }),
        yaxis: axis("latents", { range: [0, 1.15 * Math.max(...shape.counts)] }),
        shapes: [rule({ x0: threshold, x1: threshold, yref: "paper", y0: 0, y1: 1 })],
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
    return Report.scatter(classGroups(similarity, firings, every().filter(firing)), {
      x: "similarity to the partners", y: "firings", yLog: true, edges: true, xRange: [-0.02, 1.02],
    });
  };

  figures.quartiles = () => {
    const { firings, similarity, score } = Report.latents();
    const [a, b, c] = findings().scores.quartiles;
    const quarter = (latent) => [a, b, c].filter((edge) => score(latent) >= edge).length;
    const scored = columns().scored.latent.filter(firing);
    const names = [`below ${Report.decimal(a)}`, `to ${Report.decimal(b)}`, `to ${Report.decimal(c)}`, "above"];
    const groups = names.map((name, i) =>
      group(`score ${name}`, colour(`q${i}`), scored.filter((latent) => quarter(latent) === i), similarity, firings));
    return Report.scatter(groups, {
      x: "similarity to the partners", y: "firings", yLog: true, edges: true, xRange: [-0.02, 1.02],
    });
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
})();
