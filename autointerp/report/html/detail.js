/* One latent, over the page: what it fires on, what it was said to mean, what the judge made of that, and its partner in
   each sibling next to it. */
"use strict";
(() => {
  const { count, decimal, element, foreign, interval, percent, rate } = Report;
  const dialog = document.getElementById("detail");
  const KINDS = { active: "fires", random: "silent", hard: "silent, a neighbour fires", same_token: "silent, same token", mismarked: "marked wrongly" };
  let open = null;

  function detailOf(latent) {
    const chunk = Report.data("places")[latent];
    if (chunk === undefined) return null;
    return Report.data(`details-${chunk}`).find((detail) => detail.latent === latent) ?? null;
  }

  // --- parts ----------------------------------------------------------------------------------------------------

  function context({ tokens, activations }) {
    const peak = Math.max(0, ...activations);
    const line = element("bdi");
    tokens.forEach((token, i) => {
      const strength = peak > 0 ? activations[i] / peak : 0;
      if (strength <= 0) {
        Report.show(line, token);
        return;
      }
      const shade = strength >= 0.75 ? "s3" : strength >= 0.5 ? "s2" : "s1";
      const node = strength >= 0.3 ? element("mark", { class: shade }) : element("span", { class: "s0" });
      node.title = `${Report.visible(token)}  ${activations[i]}`;
      line.append(Report.show(node, token));
    });
    return element("p", { class: "context" }, line);
  }

  function histogram(shape) {
    if (shape === null) return null;
    const most = Math.max(...shape.counts);
    const bars = shape.counts.map((n) => element("i", { style: `height: ${(100 * n) / most}%` }));
    const largest = shape.edges[shape.edges.length - 1];
    const says = `Activations over all firings, from 0 to ${largest}.`;
    return element("div", {}, element("div", { class: "histogram", role: "img", "aria-label": says }, bars), element("p", { class: "quiet small" }, says));
  }

  function head(latent, detail) {
    const latents = Report.latents();
    const kind = latents.classOf(latent);
    const firing = detail?.firing ?? null;
    const tokens = (side) => (detail?.logits ? foreign(detail.logits[side].map((of) => `"${of.token}"`).join("  ")) : null);
    const facts = [
      ["fires", rate(latents.frequency(latent))],
      ["firings", firing === null ? count(latents.firings(latent)) : `${count(firing.n_firings)} in ${count(firing.n_windows)} contexts`],
      ["largest activation", firing === null ? null : `${firing.max_activation}`],
      ["promotes", tokens("promoted")],
      ["suppresses", tokens("suppressed")],
      ["found", kind === null ? null : element("span", { class: `badge ${kind}` }, Report.classNames()[kind])],
      ["similarity", latents.similarity(latent) === null ? null : decimal(latents.similarity(latent), 2)],
      ["score", latents.score(latent) === null ? latents.status(latent) : `${decimal(latents.score(latent), 2)} ${interval(latents.low(latent), latents.high(latent))}`],
      ["swapped control", latents.control(latent) === null ? null : decimal(latents.control(latent), 2)],
    ].filter(([, value]) => value !== null);
    return element("dl", { class: "facts" }, facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }

  const repeat = (of, name) => (of[name] > 0 ? `${name} ${of[name]}` : null);

  function explanations(detail) {
    return detail.explanations.map((entry) => {
      const who = [entry.model ? `${entry.explainer}: ${entry.model}` : entry.explainer, repeat(entry, "draw")].filter(Boolean).join(", ");
      const said = entry.text === null ? element("p", { class: "said wrong" }, "failed: ", foreign(entry.failure ?? "unknown")) : foreign(entry.text, "p");
      said.classList.add("said");
      said.dir = "auto";
      const flags = entry.flags.map((flag) => element("p", { class: "wrong small" }, `! ${flag}`));
      return [said, ...flags, element("p", { class: "quiet small" }, foreign(who), ` · ${entry.created.slice(0, 10)}`)];
    });
  }

  function scores(detail) {
    if (detail.scores.length === 0) return null;
    const names = ["scored by", "control", "balanced accuracy", "95 % interval", "true positive", "true negative", "AUROC", "contexts"];
    const rows = detail.scores.map((score) => {
      const who = foreign([score.scorer, score.judge, score.model, repeat(score, "draw"), repeat(score, "replicate")].filter(Boolean).join(", ") || "–");
      const head = [element("th", { scope: "row" }, who), element("td", {}, score.control === "none" ? "own explanation" : score.control)];
      if (score.status !== "ok") return [...head, element("td", { colspan: "6", class: "wrong" }, foreign(score.status))];
      const cells = [
        decimal(score.balanced_accuracy, 2), interval(score.ba_low, score.ba_high), decimal(score.tpr, 2), decimal(score.tnr, 2),
        decimal(score.auroc, 2), `${count(score.n_active)} + ${count(score.n_inactive)}`,
      ];
      return [...head, cells.map((cell) => element("td", { class: "n" }, cell))];
    });
    return Report.table("scores", names.map((name, i) => element("th", { scope: "col", class: i > 1 ? "n" : "" }, name)), rows);
  }

  function verdicts(detail) {
    const verdicts = detail.verdicts;
    if (verdicts === null) return [];
    const counts = verdicts.counts.map((of) => `${KINDS[of.kind] ?? of.kind}: ${of.n_right} of ${of.n} right`).join(" · ");
    const failed = verdicts.n_failed > 0 ? ` · ${count(verdicts.n_failed)} answers failed and count in none` : "";
    const lines = verdicts.shown.flatMap((of) => {
      const right = of.truth === of.label;
      const p = Report.known(of.p) ? ` (P ${decimal(of.p, 2)})` : "";
      const words = `${KINDS[of.kind ?? "active"] ?? of.kind}; judged ${of.label ? "active" : "silent"}${p}`;
      return [element("p", { class: `small ${right ? "right" : "wrong"}` }, `${right ? "✓" : "✕"} ${words}`), context(of)];
    });
    return [
      element("h3", {}, "What the judge said"),
      element("p", { class: "quiet" }, `Of contexts that the explainer never saw. ${counts}${failed}. Some of them, right and wrong:`),
      element("div", { class: "verdicts" }, lines),
    ];
  }

  const paragraph = (names, child) => element("p", { class: names }, child);
  const article = (run, latent, badge, children) =>
    element("article", {}, element("h4", {}, foreign(run), element("span", { class: "quiet" }, `latent ${latent}`), badge), children);

  function partner(match) {
    const holds = Object.entries(match.shared).filter(([, is]) => is).map(([name]) => name);
    const space = (name) =>
      `${name} ${match[`${name}_partner`] ?? "–"}, cosine ${decimal(match[`${name}_cosine`], 2)}` +
      (match[`max_${name}_neighbor`] === match[`${name}_partner`] ? "" : ` (nearest: ${match[`max_${name}_neighbor`]}, ${decimal(match[`max_${name}_cosine`], 2)})`);
    const behaviour = match.behaviour;
    const relation = behaviour?.relation ? (Report.data("findings").methods.relations?.[behaviour.relation] ?? behaviour.relation) : null;
    const badge = element("span", { class: `badge ${holds.includes("strict") ? "all" : "one"}` }, holds.length ? holds.join(", ") : "not shared");
    return article(match.run, match.decoder_partner ?? "–", badge, [
      paragraph("quiet", `${space("encoder")} · ${space("decoder")}`),
      behaviour === null ? null : paragraph("quiet", behaviour.jaccard_partner === null ? "By firing nothing is paired with it." : `By firing: ${behaviour.jaccard_partner}, Jaccard ${decimal(behaviour.jaccard, 2)}`),
      relation === null ? null : paragraph("quiet", `In the other SAE it ${relation}${behaviour.relation_latents?.length ? ` (${behaviour.relation_latents.join(", ")}; ${percent(behaviour.relation_covered)} of its firings)` : ""}`),
      match.explanation === null ? null : paragraph("said", foreign(match.explanation)),
      match.score === null ? null : element("p", {}, `score ${decimal(match.score, 2)}`),
      match.contexts.map(context),
    ]);
  }

  function own(detail) {
    const explanation = detail.explanations.find((entry) => entry.text !== null);
    const said = explanation ? paragraph("said", foreign(explanation.text)) : null;
    return article(Report.data("columns").run, detail.latent, null, [said, detail.contexts.slice(0, 4).map(context)]);
  }

  function body(latent, detail) {
    if (detail === null) {
      const explanation = Report.latents().explanation(latent);
      return [
        head(latent, null),
        explanation === null ? null : element("p", { class: "said" }, foreign(explanation)),
        element("p", {}, "Its contexts, verdicts and partners are not in this file, which holds those of a sample. To see them:"),
        element("pre", { class: "command" }, element("code", {}, document.querySelector("#latents .says code")?.textContent.replace(/--latent \d+/, `--latent ${latent}`) ?? "")),
      ];
    }
    return [
      ...explanations(detail).flat(),
      head(latent, detail),
      histogram(detail.activations),
      element("h3", {}, "Where it fires"),
      element("p", { class: "quiet" }, "From the strongest activation to the weakest, over its whole range; the more a token activates it, the stronger its ground."),
      detail.contexts.length > 0 ? detail.contexts.map(context) : element("p", {}, "No contexts are available."),
      scores(detail) === null ? null : element("h3", {}, "Scores and controls"),
      scores(detail),
      ...verdicts(detail),
      detail.matches.length > 0 ? element("h3", {}, "Beside its partners in the other seeds") : null,
      detail.matches.length > 0 ? element("div", { class: "side" }, own(detail), detail.matches.map(partner)) : null,
    ];
  }

  // --- opening and closing ----------------------------------------------------------------------------------------

  const go = (latent) => {
    if (latent !== null) location.hash = `latent=${latent}`;
  };

  function button(words, sign, latent) {
    const node = element("button", { type: "button", "aria-label": words, title: words, disabled: latent === null }, sign);
    node.addEventListener("click", () => go(latent));
    return node;
  }

  function show(latent) {
    const [before, after] = [Report.neighbour(latent, -1), Report.neighbour(latent, 1)];
    const close = element("button", { type: "button", "aria-label": "Close" }, "✕");
    close.addEventListener("click", () => dialog.close());
    open = { latent, before, after };
    dialog.replaceChildren(
      element("div", { class: "detail-bar" }, element("h2", { id: "detail-title", tabindex: "-1" }, `Latent ${latent}`), button("The one before", "←", before), button("The one after", "→", after), close),
      element("div", { class: "detail-body" }, body(latent, detailOf(latent))),
    );
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    document.getElementById("detail-title").focus({ preventScroll: true });
  }

  /** Open what the address says: `#latent=17`. */
  Report.followHash = () => {
    const found = /^#latent=(\d{1,9})$/.exec(location.hash);
    const latent = found ? Number(found[1]) : null;
    if (latent !== null && latent < Report.latents().n) show(latent);
    else if (dialog.open) dialog.close();
  };

  Report.makeDetail = () => {
    dialog.addEventListener("close", () => {
      if (open === null || dialog.open) return; // opened again before this event
      const { latent } = open;
      open = null;
      dialog.replaceChildren();
      if (location.hash.startsWith("#latent=")) history.replaceState(null, "", location.pathname + location.search);
      if (Report.wasInBrowser) Report.focusLatent(latent);
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(); // outside it
    });
    dialog.addEventListener("keydown", (event) => {
      if (event.target.closest("input, select, .scroll")) return;
      if (event.key === "ArrowLeft") go(open.before);
      if (event.key === "ArrowRight") go(open.after);
    });
    addEventListener("hashchange", Report.followHash);
    Report.followHash();
  };
})();
