/* What the other scripts of the page share: data, elements, safe text, numbers, colours. Texts that somebody else wrote
   reach the page by `textContent` alone, never as HTML, and with every character that acts instead of showing replaced
   by a sign for it (the rule is that of autointerp/report/visible.py). */
"use strict";
const Report = {};

(() => {
  const HIDDEN = /([\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}])/u; // the group keeps each of them in `split`
  const SIGNS = { "\n": "↵", "\t": "⇥", "\x7f": "␡" };

  function sign(character) {
    const code = character.codePointAt(0);
    if (character in SIGNS) return SIGNS[character];
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
  }

  Report.visible = (text) => text.split(HIDDEN).map((part) => (HIDDEN.test(part) ? sign(part) : part)).join("");

  /** Put `text` into `node`, signs for hidden characters in a quieter colour. */
  Report.show = (node, text) => {
    for (const part of text.split(HIDDEN)) node.append(HIDDEN.test(part) ? element("span", { class: "sign" }, sign(part)) : part);
    return node;
  };

  /** A text of somebody else's, kept apart from the reading direction around it. */
  Report.foreign = (text, tag = "bdi") => Report.show(document.createElement(tag), text);

  /** An element; strings among `children` become text. */
  const element = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) node.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return node;
  };
  Report.element = element;

  /** A table that scrolls by itself; a row is a list of cells. */
  Report.table = (label, heads, rows) =>
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
      element("table", {}, element("thead", {}, element("tr", {}, heads)), element("tbody", {}, rows.map((cells) => element("tr", {}, cells)))));

  const read = {};
  Report.data = (name) => (read[name] ??= JSON.parse(document.getElementById(`data-${name}`).textContent));

  /** A function that computes its value once, when it is first asked. */
  Report.once = (compute) => {
    let made;
    return () => (made ??= compute());
  };

  // Numbers, written as autointerp/report/numbers.py writes them.
  Report.known = (value) => typeof value === "number" && Number.isFinite(value);
  Report.decimal = (value, digits = 3) => {
    if (!Report.known(value)) return "–";
    const body = Math.abs(value).toFixed(digits).replace(/^0\./, ".");
    return (value < 0 && Number(value.toFixed(digits)) !== 0 ? "−" : "") + body;
  };
  // More digits where all values would be written as 0, or as ±1, and are not.
  const digitsOf = (values, digits, most = 5) => {
    for (let n = digits; n < digits + most; n += 1) {
      const written = values.map((value) => Number(value.toFixed(n)));
      if (!written.every((value) => value === written[0]) || ![0, 1, -1].includes(written[0])) return n;
    }
    return values.every((value) => Math.abs(value - Math.round(value)) < 1e-9) ? digits : digits + most;
  };
  Report.percent = (value) =>
    Report.known(value) ? `${(100 * value).toFixed(digitsOf([value], 3) - 2)} %` : "–";
  Report.interval = (low, high, digits = 2) => {
    if (!Report.known(low) || !Report.known(high)) return "";
    const n = digitsOf([low, high], digits);
    return `[${Report.decimal(low, n)}, ${Report.decimal(high, n)}]`;
  };
  Report.count = (value) => (Report.known(value) ? value.toLocaleString("en") : "–");
  Report.rate = (value) => {
    if (!Report.known(value)) return "–";
    const thousand = 1000 * value;
    const text = Number(thousand.toPrecision(thousand >= 1 ? 3 : 2));
    return `${text >= 1e-4 || text === 0 ? text : thousand.toExponential(1)} ‰`;
  };

  Report.classNames = () => {
    const others = Report.data("columns").against.length;
    return { one: "in no other seed", some: "in some seeds", all: others === 1 ? "in the other seed" : "in every seed" };
  };

  Report.colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  /** Columns [M] and look-ups of every latent, out of what the page holds. */
  Report.latents = Report.once(() => {
    const columns = Report.data("columns");
    const place = new Map(columns.scored.latent.map((latent, i) => [latent, i]));
    const ofAll = (name) => (latent) => columns.latents[name]?.[latent] ?? null;
    const ofScored = (name) => (latent) => (place.has(latent) ? columns.scored[name][place.get(latent)] : null);
    return {
      n: columns.n_latents,
      classOf: (latent) => columns.classes[columns.latents.shared_class[latent]] ?? null,
      status: (latent) => columns.statuses[columns.latents.status[latent]],
      frequency: ofAll("frequency"),
      firings: ofAll("n_firings"),
      similarity: ofAll("similarity"),
      shared: ofAll("n_shared"),
      score: ofScored("score"),
      low: ofScored("low"),
      high: ofScored("high"),
      control: ofScored("control"),
      explanation: (latent) => columns.explanations[latent] ?? null,
    };
  });

  /** `rows` as a file to save. Text that a spreadsheet would take for a formula begins with an apostrophe. */
  Report.saveCsv = (name, head, rows) => {
    const cell = (value) => {
      if (value === null || value === undefined) return "";
      let text = String(value);
      if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = [head, ...rows].map((row) => row.map(cell).join(","));
    Report.save(`${name}.csv`, "text/csv", `${lines.join("\r\n")}\r\n`);
  };

  Report.save = (name, type, text) => {
    const url = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
    element("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  };
})();
