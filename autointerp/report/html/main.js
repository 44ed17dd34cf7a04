/* The page comes to life: colours, the list of latents, the open latent, and, once Plotly is there, the figures. */
"use strict";
(() => {
  const THEMES = ["system", "light", "dark"];
  const button = document.getElementById("theme");
  let storage = null;
  try {
    storage = localStorage;
  } catch {
    // a page opened from a file may have none
  }

  function setTheme(theme) {
    if (theme === "system") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.dataset.theme = theme;
    button.dataset.theme = theme;
    button.setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system has them" : theme}`);
    button.title = button.getAttribute("aria-label");
    button.firstElementChild.textContent = { system: "◐", light: "☀", dark: "☾" }[theme];
  }

  const remembered = storage?.getItem("autointerp-colours");
  setTheme(THEMES.includes(remembered) ? remembered : "system");
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(button.dataset.theme) + 1) % THEMES.length];
    setTheme(next);
    storage?.setItem("autointerp-colours", next);
    Report.redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => Report.redraw());

  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea, dialog")) return;
    event.preventDefault();
    document.getElementById("search").focus();
  });

  document.getElementById("save-findings").addEventListener("click", () =>
    Report.save(`${Report.data("columns").run}.findings.json`, "application/json", document.getElementById("data-findings").textContent),
  );

  // Which chapter is in sight, in the bar above.
  const links = new Map([...document.querySelectorAll(".bar nav a")].map((link) => [link.hash.slice(1), link]));
  const inSight = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-20% 0px -75% 0px" },
  );
  for (const id of links.keys()) inSight.observe(document.getElementById(id));

  Report.makeBrowser();
  document.getElementById("browser").addEventListener("focusin", () => {
    Report.wasInBrowser = true;
  });
  Report.makeDetail();
  document.documentElement.dataset.ready = "latents";
  addEventListener("DOMContentLoaded", () => {
    Report.watchFigures();
    document.documentElement.dataset.ready = "figures";
  });
  addEventListener("beforeprint", () => Report.print(true));
  addEventListener("afterprint", () => Report.print(false));
})();
