// Light or dark, as chosen here or else as the system says. Not a module, so that it runs before anything is painted.

{
  const NAME = "ergo-vqa.scheme";
  const apply = (scheme) => (document.documentElement.dataset.scheme = scheme);
  let chosen = "auto";
  try {
    chosen = localStorage.getItem(NAME) ?? chosen;
  } catch {}
  apply(chosen);
  document.addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("scheme");
    select.value = chosen;
    select.addEventListener("change", () => {
      apply(select.value);
      try {
        localStorage.setItem(NAME, select.value);
      } catch {}
    });
  });
}
