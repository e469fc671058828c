// Light or dark, before anything is painted: the system's choice until the reader makes another.
(() => {
  const NEXT = { auto: "light", light: "dark", dark: "auto" };
  const SHOWN = { auto: "◐ System", light: "☀ Light", dark: "☾ Dark" };
  let theme = "auto";
  try {
    theme = localStorage.getItem("tarflow-theme") ?? "auto";
  } catch {
    // Storage is switched off; the choice then lasts as long as the page.
  }

  function use(chosen) {
    theme = chosen in NEXT ? chosen : "auto";
    document.documentElement.dataset.theme = theme;
  }

  use(theme);
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => {
      button.textContent = SHOWN[theme];
      button.setAttribute("aria-label", `Colours: ${theme === "auto" ? "as the system" : theme}. Change`);
    };
    button.hidden = false;
    button.addEventListener("click", () => {
      use(NEXT[theme]);
      show();
      try {
        localStorage.setItem("tarflow-theme", theme);
      } catch {
        // See above.
      }
    });
    show();
  });
})();
