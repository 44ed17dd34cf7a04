/* The list of all latents: only the rows in sight are in the document, so that 32,768 of them scroll like ten. */
"use strict";
(() => {
  const { count, decimal, element, foreign, interval, known, rate } = Report;
  const ROW = 36;
  const BEYOND = 8; // rows kept ready above and below those in sight
  const browser = document.getElementById("browser");
  const at = (id) => document.getElementById(id);
  let kept = []; // the latents that pass the filters, in order
  let sort = { key: "latent", falling: false };
  let focused = 0; // place in `kept`
  let rows = null;
  let tall = null;

  const of = (name) => (latent) => Report.latents()[name](latent);
  const scoreOf = (latent) => decimal(of("score")(latent), 2);
  const NUMBER = "number wide-only";
  /** Each column: its title, classes and key, the value that it is sorted by, and what its cell holds. */
  const COLUMNS = [
    { key: "latent", title: "latent", names: "number", value: (latent) => latent, show: (latent) => element("span", { class: isHeld(latent) ? "held" : "" }, `${latent}`) },
    { key: "class", title: "found", names: "wide-only", value: of("shared"), show: badge },
    { key: "similarity", title: "similarity", names: NUMBER, value: of("similarity"), show: (latent) => decimal(of("similarity")(latent), 2) },
    { key: "rate", title: "fires", names: NUMBER, value: of("frequency"), show: (latent) => rate(of("frequency")(latent)) },
    { key: "score", title: "score", names: NUMBER, value: of("score"), show: (latent) => `${scoreOf(latent)} ${interval(of("low")(latent), of("high")(latent))}` },
    { key: "control", title: "swapped", names: NUMBER, value: of("control"), show: (latent) => decimal(of("control")(latent), 2) },
    { key: "explanation", title: "explanation", names: "", value: of("explanation"), show: explanation },
    { key: "short", title: "score", names: "number narrow-only", value: of("score"), show: scoreOf },
  ];

  // --- filters ------------------------------------------------------------------------------------------------

  const typed = (id) => (at(id).value === "" ? null : Number(at(id).value));
  const within = (value, least, most) =>
    (least === null && most === null) || (known(value) && (least === null || value >= least) && (most === null || value <= most));

  function passes() {
    const latents = Report.latents();
    const words = at("search").value.trim().toLowerCase();
    const [kind, status] = [at("by-class")?.value ?? "", at("by-status").value];
    const [least, most] = [typed("least-score"), typed("most-score")];
    const [rare, frequent] = [typed("least-rate"), typed("most-rate")];
    const exact = /^\d+$/.test(words) ? Number(words) : null;
    return (latent) =>
      (kind === "" || latents.classOf(latent) === kind) &&
      (status === "" || latents.status(latent) === status) &&
      within(latents.score(latent), least, most) &&
      within(known(latents.frequency(latent)) ? 1000 * latents.frequency(latent) : null, rare, frequent) &&
      (words === "" || latent === exact || Boolean(latents.explanation(latent)?.toLowerCase().includes(words)));
  }

  function order() {
    const { value } = COLUMNS.find((column) => column.key === sort.key);
    const values = new Map(kept.map((latent) => [latent, value(latent)]));
    const sign = sort.falling ? -1 : 1;
    kept.sort((a, b) => {
      const [x, y] = [values.get(a), values.get(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a - b; // what is missing comes last
      return (x < y ? -sign : x > y ? sign : 0) || a - b;
    });
  }

  function refresh() {
    kept = Array.from({ length: Report.latents().n }, (_, latent) => latent).filter(passes());
    order();
    focused = 0;
    at("count").textContent = `${count(kept.length)} of ${count(Report.latents().n)} latents`;
    tall.style.height = `${kept.length * ROW}px`;
    browser.setAttribute("aria-rowcount", kept.length + 1);
    rows.scrollTop = 0;
    paint();
  }

  // --- rows -----------------------------------------------------------------------------------------------------

  function badge(latent) {
    const kind = of("classOf")(latent);
    const never = of("firings")(latent) === 0;
    return element("span", { class: `badge ${kind ?? ""}` }, kind === null ? (never ? "never fires" : "–") : Report.classNames()[kind]);
  }

  const isHeld = (latent) => Report.data("places")[latent] !== undefined;

  function explanation(latent) {
    const text = of("explanation")(latent);
    return text === null ? element("span", { class: "quiet" }, of("status")(latent)) : foreign(text.slice(0, 300));
  }

  const cells = (latent) => COLUMNS.map(({ names, show }) => element("div", { role: "gridcell", class: names }, show(latent)));

  function row(i) {
    const latent = kept[i];
    const place = { "aria-rowindex": i + 2, tabindex: i === focused ? "0" : "-1", "data-place": i, style: `top: ${i * ROW}px` };
    return element("div", { role: "row", ...place }, cells(latent));
  }

  function paint() {
    const first = Math.max(0, Math.floor(rows.scrollTop / ROW) - BEYOND);
    const last = Math.min(kept.length, Math.ceil((rows.scrollTop + rows.clientHeight) / ROW) + BEYOND);
    const had = document.activeElement?.closest?.("#browser .rows [role=row]");
    const places = new Set();
    for (let i = first; i < last; i += 1) places.add(i);
    // The focused row stays in the document: else scrolling would drop the keyboard's place.
    if (kept.length > 0) places.add(focused);
    tall.replaceChildren(...[...places].sort((a, b) => a - b).map(row));
    if (kept.length === 0) tall.append(element("p", { class: "none" }, "No latent is like that."));
    if (had) tall.querySelector(`[data-place="${focused}"]`)?.focus({ preventScroll: true });
  }

  function focusOn(i) {
    if (kept.length === 0) return;
    focused = Math.min(kept.length - 1, Math.max(0, i));
    const [top, bottom] = [focused * ROW, (focused + 1) * ROW];
    if (top < rows.scrollTop) rows.scrollTop = top;
    else if (bottom > rows.scrollTop + rows.clientHeight) rows.scrollTop = bottom - rows.clientHeight;
    paint();
    tall.querySelector(`[data-place="${focused}"]`)?.focus({ preventScroll: true });
  }

  const KEYS = {
    ArrowDown: (i) => i + 1,
    ArrowUp: (i) => i - 1,
    PageDown: (i) => i + Math.floor(rows.clientHeight / ROW),
    PageUp: (i) => i - Math.floor(rows.clientHeight / ROW),
    Home: () => 0,
    End: () => kept.length - 1,
  };

  function heads() {
    const head = (column) => {
      const button = element("button", { type: "button" }, column.title);
      button.addEventListener("click", () => {
        const falling = sort.key === column.key ? !sort.falling : column.names.includes("number") && column.key !== "latent";
        sort = { key: column.key, falling };
        for (const node of browser.querySelectorAll("[role=columnheader]")) {
          const own = node.dataset.key === sort.key;
          node.setAttribute("aria-sort", own ? (sort.falling ? "descending" : "ascending") : "none");
        }
        refresh();
      });
      const sorted = column.key === sort.key ? "ascending" : "none";
      return element("div", { role: "columnheader", class: column.names, "data-key": column.key, "aria-sort": sorted }, button);
    };
    return element("div", { role: "row", class: "heads", "aria-rowindex": "1" }, COLUMNS.map(head));
  }

  /** The latent that is `step` places after `latent` in the list as it is filtered and sorted; null where there is none. */
  Report.neighbour = (latent, step) => {
    const i = kept.indexOf(latent);
    return i < 0 ? null : (kept[i + step] ?? null);
  };

  Report.focusLatent = (latent) => {
    const i = kept.indexOf(latent);
    if (i >= 0) focusOn(i);
  };

  Report.makeBrowser = () => {
    const { classes, statuses } = Report.data("columns");
    for (const name of at("by-class") ? classes : []) at("by-class").append(element("option", { value: name }, Report.classNames()[name]));
    for (const name of statuses) at("by-status").append(element("option", { value: name }, name));
    tall = element("div", { role: "presentation" });
    rows = element("div", { class: "rows", role: "rowgroup", tabindex: "-1" }, tall);
    browser.append(element("div", { role: "rowgroup" }, heads()), rows);
    let waiting = 0;
    const later = () => {
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(refresh);
    };
    at("filters").addEventListener("input", later);
    at("filters").addEventListener("reset", () => setTimeout(refresh));
    at("filters").addEventListener("submit", (event) => event.preventDefault());
    rows.addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
    rows.addEventListener("click", (event) => {
      const node = event.target.closest("[data-place]");
      if (!node) return;
      focused = Number(node.dataset.place);
      location.hash = `latent=${kept[focused]}`;
    });
    rows.addEventListener("keydown", (event) => {
      if (event.key in KEYS) {
        event.preventDefault();
        focusOn(KEYS[event.key](focused));
      } else if (event.key === "Enter" && kept.length > 0) {
        event.preventDefault();
        location.hash = `latent=${kept[focused]}`;
      }
    });
    at("search").addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" || event.key === "Enter") {
        event.preventDefault();
        focusOn(0);
      }
    });
    refresh();
  };
})();
