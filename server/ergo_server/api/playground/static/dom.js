// Small helpers around the document. Text is always set as text: nothing here parses HTML.

export const by = (id) => document.getElementById(id);

/** Makes an element. Properties are set on it, `class` and `aria-…` as attributes; children are elements or texts. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class" || name === "scope" || name.startsWith("aria-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}
