const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { images, concepts, classes } = data;
const page = byId("page");
const colours = Uint8Array.from({ length: 768 }, (_, i) => parseInt(data.heat.slice(2 * i, 2 * i + 2), 16));
const where = data.maps ? "at" : "in";
const classIndex = new Map(classes.map((c, i) => [c.class, i]));
const numThumbnails = images.length;
let thumbnails = null;

// -- elements: text only ever becomes text nodes ---------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "on") for (const [event, f] of Object.entries(value)) element.addEventListener(event, f);
    else if (name === "css") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const short = (value) => value.length > 120 ? value.slice(0, 119) + "…" : value;
const text = (value) => h("bdi", { title: value.length > 120 && value }, short(value));
const section = (title, ...children) => h("section", { class: "panel" }, h("h2", null, title), ...children);

function number(value, signed) {
  if (value === null || value === undefined) return "–";
  value = Number(value.toPrecision(3));
  const size = Math.abs(value);
  const digits = size === 0 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(size)));
  let out = digits > 5 || size >= 1e6 ? value.toExponential(2)
    : value.toLocaleString("en", { minimumFractionDigits: Math.min(digits, 5), maximumFractionDigits: Math.min(digits, 5) });
  if (signed && value > 0) out = "+" + out;
  return out.replace(/-/g, "\u2212");
}
const counted = (value, noun) => value === null ? `– ${noun}s` : `${value.toLocaleString("en")} ${noun}${value === 1 ? "" : "s"}`;
const percent = (value) => value === null || value === undefined ? "–" : value > 0 && value < 0.0005 ? "< 0.1 %"
  : (100 * value).toFixed(value >= 0.0995 || value === 0 ? 0 : 1) + " %";
