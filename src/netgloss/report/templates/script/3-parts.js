// -- parts of pages --------------------------------------------------------------------------------------------

const served = (concept) => concept.serves; // classes with enough images and contribution behind them
// Whether an image was taken for another class: only if its label is a class of the network.
const isWrong = ({ known, label, prediction }) => known && label !== null && prediction !== null && label !== prediction;
const isRight = ({ known, label, prediction }) => known && label !== null && label === prediction;
const title = (concept) => concept.label ? concept.label.text : concept.name;
const conceptLink = (id) => h("a", { href: `#/concepts/${id}` }, text(title(concepts[id])));
const classLink = (name) => classIndex.has(name) ? h("a", { href: `#/classes/${classIndex.get(name)}` }, text(name)) : text(name);
const whatIsSeen = (image) => short(images[image].label ?? images[image].prediction ?? images[image].id);

function emblem(id) {
  const entry = concepts[id].gallery.find((one) => images[one.image].size);
  return entry ? picture(entry.image, entry.map, "") : null;
}

const weakness = (map) => map && isWeak(map) ? h("span", { class: "muted" }, " (weak here)") : null;

// The pictures of a concept's strongest images; as many columns as there are, at most two.
function mosaic(concept, most) {
  const lead = concept.gallery.filter((entry) => images[entry.image].size).slice(0, most);
  const shown = lead.length === 3 ? lead.slice(0, 2) : lead;
  return shown.length ? h("div", { class: `mosaic of-${shown.length}` }, shown.map((entry) => picture(entry.image, entry.map, ""))) : null;
}

function card(concept) {
  return h("a", { class: "card", href: `#/concepts/${concept.id}` },
    mosaic(concept, 4),
    h("div", { class: "body" },
      h("h3", { class: "clamp" }, text(title(concept)), concept.label ? h("small", null, " ", text(concept.name)) : null),
      h("p", null, text(concept.sentence)),
      h("p", null, `active ${where} ${percent(concept.share_active)}`, concept.stability === null ? "" : ` · stability ${number(concept.stability)}`),
      meter(concept.importance)));
}
const mostImportant = Math.max(1e-12, ...concepts.map((c) => Math.abs(c.importance ?? 0)));
const meter = (importance) => h("div", { class: "meter", title: "share of all that concepts add to predictions" },
  h("div", { class: "track" }, h("i", { css: { width: `${100 * Math.abs(importance ?? 0) / mostImportant}%` } })),
  h("span", null, percent(importance)));

// Bars from a common zero; entries {label, value, low, high, picture, plain, unsigned}.
function bars(entries, pictured) {
  const ends = entries.flatMap((e) => [e.value, e.low, e.high]).filter((v) => v !== null && v !== undefined);
  const low = Math.min(0, ...ends), high = Math.max(0, ...ends), span = high - low || 1;
  const place = (value) => `${100 * (value - low) / span}%`;
  const width = (a, b) => `${100 * Math.abs(a - b) / span}%`;
  return h("ul", { class: pictured ? "bars pictured" : "bars" }, entries.map((e) => h("li", null,
    pictured ? e.picture ?? h("span") : null,
    h("span", { class: "clamp" }, e.label),
    h("span", { class: "axis", "aria-hidden": "true" },
      h("i", { class: e.plain ? "plain" : e.value < 0 ? "minus" : "", css: { left: place(Math.min(0, e.value ?? 0)), width: width(e.value ?? 0, 0) } }),
      e.low !== null && e.low !== undefined && e.high !== null && e.high !== undefined
        ? h("u", { css: { left: place(e.low), width: width(e.low, e.high) } }) : null,
      h("s", { css: { left: place(0) } })),
    h("span", { class: "value" }, number(e.value, !e.unsigned)))));
}

// What speaks for and what against, in two columns on one scale; ``most`` in each.
function forAndAgainst(entries, most = 12) {
  const sorted = [...entries].sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const sides = [["Speaks for it", sorted.filter((e) => e.value > 0)], ["Speaks against it", sorted.filter((e) => e.value < 0)]];
  const top = Math.max(1e-12, ...sides.flatMap(([, side]) => side.map((e) => Math.abs(e.value))));
  return h("div", { class: "two-sides" }, sides.map(([name, side]) => h("div", null, h("h4", null, name),
    side.length ? h("ul", { class: "side" }, side.slice(0, most).map((e) => h("li", { class: e.picture ? "pictured" : "" }, e.picture, h("span", { class: "what" }, e.label,
      h("span", { class: "track", "aria-hidden": "true" }, h("i", { class: e.value < 0 ? "minus" : "", css: { width: `${100 * Math.abs(e.value) / top}%` } }))),
    h("span", { class: "value" }, number(e.value, true),
      e.low !== null && e.low !== undefined && e.high !== null && e.high !== undefined ? h("small", null, `${number(e.low)} to ${number(e.high)}`) : null))))
      : h("p", { class: "muted" }, "No concept."))));
}

function histogram({ edges, counts }) {
  const most = Math.log1p(Math.max(1, ...counts)), span = edges.at(-1) - edges[0] || 1;
  const x = (value) => 8 + 284 * (value - edges[0]) / span;
  return svg("svg", { class: "histogram", viewBox: "0 0 300 112", role: "img",
    "aria-label": `Histogram of the activation from ${number(edges[0])} to ${number(edges.at(-1))}; the fullest bin holds ${Math.max(...counts)}` },
  counts.map((count, i) => svg("rect", { x: x(edges[i]), width: Math.max(0.5, x(edges[i + 1]) - x(edges[i]) - 0.7),
    y: 94 - 84 * Math.log1p(count) / most, height: 84 * Math.log1p(count) / most },
  svg("title", null, `${number(edges[i])} to ${number(edges[i + 1])}: ${count}`))),
  svg("line", { x1: 8, x2: 292, y1: 94.5, y2: 94.5 }),
  svg("text", { x: 8, y: 107 }, number(edges[0])),
  svg("text", { x: 292, y: 107, "text-anchor": "end" }, number(edges.at(-1))));
}

const facts = (pairs) => h("dl", { class: "facts" }, pairs.filter((pair) => pair[1] !== null && pair[1] !== undefined && pair[1] !== "–")
  .map(([name, value]) => h("div", null, h("dt", null, text(name)), h("dd", null, value))));

// A choice between pages that show the same things in two ways.
const ways = (here, ...links) => h("nav", { class: "segments", "aria-label": "Show as" },
  links.map(([to, name]) => h("a", { href: to, "aria-current": to === here && "page" }, name)));

function mapChoice() {
  const choices = [["outline", "Outline"], ["heat", "Heat"], ["photo", "Photo"]];
  const group = h("div", { class: "segments", role: "group", "aria-label": "Show on pictures" },
    choices.map(([mode, label]) => h("button", { type: "button", "data-mode": mode, "aria-pressed": document.body.dataset.maps === mode,
      on: { click: () => setMaps(mode) } }, label)));
  return group;
}
function setMaps(mode) {
  document.body.dataset.maps = mode;
  document.querySelectorAll("[data-mode]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.mode === mode));
}

function crumbs(kind, label, before, after) {
  const step = (to, name, rel) => to !== undefined ? h("a", { href: `#/${kind}/${to}`, rel }, name) : null;
  return h("div", { class: "crumbs" }, h("a", { href: `#/${kind}` }, `All ${label}`),
    h("span", null, step(before, "← previous", "prev"), step(after, "next →", "next")));
}

const nothing = (kind, index) => h("div", null, h("h1", { tabindex: -1 }, "Not here"),
  h("p", { class: "note" }, `This report has no ${kind} ${short(String(index))}.`));

const kept = {};
const keep = (name, make) => () => (kept[name] ||= make());
