// Elements of the page: found by id, and made. Text is text: nothing that comes from outside is ever read as HTML.

export const byId = (id) => document.getElementById(id);

/** An element with properties (`class`, `dataset`, `aria-…` and other attributes, `on…`) and children. */
export function make(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") node.className = value;
    else if (key === "dataset") Object.assign(node.dataset, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && !key.startsWith("aria-")) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A list of terms and what is said of each; null ones are left out. */
export function facts(pairs) {
  const said = pairs.filter(([, value]) => value !== null && value !== undefined);
  return make("dl", {}, ...said.flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]));
}

/** The options of a select, as [value, text]; keeps the choice where it is still there. */
export function setOptions(select, options, chosen) {
  const wanted = chosen ?? select.value;
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  select.value = options.some(([value]) => value === wanted) ? wanted : options[0]?.[0] ?? "";
  select.disabled = options.length === 0;
}

/** Base64 as a file. */
export function blobOf(b64, type = "image/png") {
  return new Blob([Uint8Array.from(atob(b64), (letter) => letter.charCodeAt(0))], { type });
}

export const dataUrl = (b64, type = "image/png") => `data:${type};base64,${b64}`;
