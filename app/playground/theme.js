// Not a module: it runs before the page is painted, so that nobody is shown the wrong light first.
(() => {
  "use strict";
  const KEY = "darkroom.theme";
  const root = document.documentElement;
  const systemIsLight = matchMedia("(prefers-color-scheme: light)");

  function stored() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is off: the system's choice then
    }
  }

  function current() {
    const chosen = root.dataset.theme;
    return chosen || (systemIsLight.matches ? "light" : "dark");
  }

  function choose(theme) {
    const isSystems = theme === (systemIsLight.matches ? "light" : "dark");
    if (isSystems) delete root.dataset.theme;
    else root.dataset.theme = theme;
    try {
      if (isSystems) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, theme);
    } catch {
      // then it lasts as long as the page
    }
  }

  const kept = stored();
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => {
      const other = current() === "dark" ? "light" : "dark";
      button.setAttribute("aria-label", `Switch to ${other} colours`);
      button.title = button.getAttribute("aria-label");
      dispatchEvent(new Event("darkroom:theme"));
    };
    button.addEventListener("click", () => {
      choose(current() === "dark" ? "light" : "dark");
      show();
    });
    systemIsLight.addEventListener("change", show);
    show();
  });
})();
