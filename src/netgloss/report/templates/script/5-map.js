// -- the flat map of concepts: near means alike ----------------------------------------------------------------

const HUES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"]; // Okabe and Ito's, safe for colour-blind readers
const FEW = 40;

// Colours go to the classes that most concepts serve first; every other concept is grey.
function classHues() {
  const counts = new Map();
  for (const c of concepts) if (served(c).length) counts.set(served(c)[0], (counts.get(served(c)[0]) ?? 0) + 1);
  const leading = [...counts].sort((a, b) => b[1] - a[1]).slice(0, HUES.length);
  return new Map(leading.map(([name], i) => [name, HUES[i]]));
}

const mapPage = keep("map", () => {
  const { points, way, of, kept: share, chance, neighbours } = data.map;
  const hues = classHues(), pictured = concepts.length <= FEW;
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const [left, top] = [Math.min(...xs), Math.min(...ys)];
  const wide = Math.max(...xs) - left || 1, tall = Math.max(...ys) - top || 1;
  const aspect = Math.min(1.9, Math.max(1.15, wide / tall)), scale = Math.min(1 / wide, 1 / (tall * aspect));
  const at = (id) => [50 + 86 * scale * (xs[id] - left - wide / 2), 50 + 86 * aspect * scale * (ys[id] - top - tall / 2)];
  const lines = svg("svg", { class: "ties", viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  const told = h("p", { class: "count", role: "status" }, found(concepts.length));
  const preview = h("aside", { class: "preview" });
  let current = null;

  const nodes = concepts.map((c) => {
    const [x, y] = at(c.id), size = 0.7 + 1.5 * Math.sqrt(Math.abs(c.importance ?? 0) / mostImportant);
    return h("a", { class: pictured ? "node pictured" : "node", href: `#/concepts/${c.id}`, tabindex: -1,
      "aria-label": `${short(title(c))}, for ${served(c).slice(0, 2).map(short).join(" and ") || "no class here"}`,
      css: { left: `${x}%`, top: `${y}%`, "--hue": hues.get(served(c)[0]) ?? "var(--muted)", "--size": `${size}rem` },
      on: { focus: () => look(c.id), pointerenter: () => look(c.id) } }, pictured ? emblem(c.id) : null);
  });
  const field = h("div", { class: "field", role: "group", "aria-label": "Map of concepts; arrow keys go from one to the next",
    css: { "--aspect": aspect }, on: { keydown: walk } }, lines, nodes);

  function look(id) {
    if (current !== null) nodes[current].tabIndex = -1;
    const changed = current !== id;
    current = id;
    nodes[id].tabIndex = 0;
    nodes.forEach((node, i) => node.classList.toggle("chosen", i === id));
    if (!changed) return;
    lines.replaceChildren(...concepts[id].neighbours.map((near) => {
      const [x1, y1] = at(id), [x2, y2] = at(near.concept);
      return svg("line", { x1, y1, x2, y2, "stroke-opacity": Math.max(0.15, near.similarity) });
    }));
    preview.replaceChildren(card(concepts[id]), h("p", { class: "muted" }, "Most like it: ",
      concepts[id].neighbours.slice(0, 3).flatMap((near, i) => [i ? ", " : "", conceptLink(near.concept), ` (${number(near.similarity)})`])));
  }

  function walk(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way || current === null) return;
    event.preventDefault();
    event.stopPropagation();
    const [x, y] = at(current);
    let best = null, least = Infinity;
    for (const c of concepts) {
      const [dx, dy] = [at(c.id)[0] - x, (at(c.id)[1] - y) / aspect];
      const ahead = dx * way[0] + dy * way[1], aside = Math.abs(dx * way[1] - dy * way[0]);
      if (c.id === current || nodes[c.id].classList.contains("dim") || ahead <= 0 || aside > 2 * ahead) continue;
      if (ahead + 2 * aside < least) [best, least] = [c.id, ahead + 2 * aside];
    }
    if (best !== null) nodes[best].focus();
  }

  const { search, filter } = finder((fits) => {
    const shown = concepts.filter(fits);
    nodes.forEach((node, i) => node.classList.toggle("dim", !fits(concepts[i])));
    told.textContent = found(shown.length);
    if (shown.length) look(shown.reduce((a, b) => Math.abs(b.importance ?? 0) > Math.abs(a.importance ?? 0) ? b : a).id);
  });
  look(ranked("importance")[0].id);
  const legend = hues.size ? h("ul", { class: "legend" }, [...hues].map(([name, hue]) => h("li", null, h("i", { css: { background: hue } }), text(name))),
    h("li", null, h("i"), "others")) : null;
  return h("div", null, h("h1", { tabindex: -1 }, "Concepts by likeness"),
    h("div", { class: "bar-tools" }, search, filter, pictured ? mapChoice() : null, conceptWays("#/map")), told,
    h("div", { class: "chart-and-card" }, h("div", null, field, legend), preview),
    h("p", { class: "muted" }, `Laid out by ${way} from the ${of === "codes" ? "correlations of the codes" : "cosines of the directions"}; colour tells the class that a concept serves most. `
      + `The map keeps ${percent(share)} of each concept's ${neighbours} nearest (random places: ${percent(chance)}); the lines go to its nearest ones, however far the map put them. `
      + "How far apart two groups lie means little."));
});
