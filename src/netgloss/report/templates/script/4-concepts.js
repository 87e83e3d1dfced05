// -- pages -----------------------------------------------------------------------------------------------------

const orders = {
  importance: ["Importance", (c) => -Math.abs(c.importance ?? 0)],
  activity: ["How often active", (c) => -(c.share_active ?? 0)],
  strength: ["Strongest activation", (c) => -(c.max ?? 0)],
  stability: ["Stability over seeds", (c) => -(c.stability ?? -1)],
  number: ["Number", (c) => c.id],
};
const ranked = (order) => [...concepts].sort((a, b) => orders[order][1](a) - orders[order][1](b) || a.id - b.id);

// Search words and a class: what of the concepts fits them; ``change`` is called with the test.
function finder(change) {
  const haystacks = concepts.map((c) => [c.name, c.label?.text ?? "", ...served(c)].join("\n").toLowerCase());
  const search = h("input", { type: "search", placeholder: "name, label or class", autocomplete: "off", on: { input: tell } });
  const filter = h("select", { on: { change: tell } }, h("option", { value: "" }, "every class"),
    [...new Set(concepts.flatMap(served))].sort().map((name) => h("option", { value: name }, short(name))));
  function tell() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    change((c) => words.every((word) => haystacks[c.id].includes(word)) && (!filter.value || served(c).includes(filter.value)));
  }
  return { search: h("label", { class: "grow" }, "Search", search), filter: h("label", null, "That serve", filter) };
}
const found = (shown) => (shown === concepts.length ? "" : `${shown} of `) + counted(concepts.length, "concept");
const conceptWays = (here) => data.map ? ways(here, ["#/concepts", "Cards"], ["#/map", "Map"]) : null;

const atlas = keep("atlas", () => {
  const cards = concepts.map(card);
  const grid = h("div", { class: "atlas" });
  const told = h("p", { class: "count", role: "status" }, found(concepts.length));
  const order = h("select", { on: { change: sort } }, Object.entries(orders).map(([key, [name]]) => h("option", { value: key }, name)));
  const { search, filter } = finder((fits) => {
    let shown = 0;
    for (const c of concepts) shown += !(cards[c.id].hidden = !fits(c));
    told.textContent = found(shown);
  });
  function sort() { grid.append(...ranked(order.value).map((c) => cards[c.id])); }
  sort();
  return h("div", null, h("h1", { tabindex: -1 }, "Concepts"),
    h("div", { class: "bar-tools" }, search, h("label", null, "Sort by", order), filter, mapChoice(), conceptWays("#/concepts")), told, grid);
});

function conceptPage(id) {
  const c = concepts[id];
  if (!c) return nothing("concept", id);
  const pictured = c.gallery.filter((entry) => images[entry.image].size);
  const scores = Object.entries(c.scores).map(([name, value]) => [name.replace(/_/g, " "), number(value)]);
  return h("div", null, crumbs("concepts", "concepts", concepts[id - 1]?.id, concepts[id + 1]?.id),
    h("h1", { tabindex: -1 }, text(title(c))),
    c.label ? h("p", { class: "lede" }, text(c.name), ", labelled by evidence", c.label.metric ? [": ", text(c.label.metric), ` ${number(c.label.value)}`] : "") : null,
    h("div", { class: "detail" },
      h("section", null,
        h("div", { class: "bar-tools" }, h("h2", null, "Where it is strongest"), mapChoice()),
        c.gallery.length && !pictured.length ? h("p", { class: "note" }, "This run has no pictures of its images. Strongest in: ",
          c.gallery.map((entry, i) => [i ? ", " : "", h("a", { href: `#/images/${entry.image}` }, text(images[entry.image].id))]), ".")
        : c.gallery.length ? h("div", { class: "gallery" }, pictured.map((entry) => {
          const image = images[entry.image];
          return h("div", { class: "tile" }, h("a", { href: `#/images/${entry.image}` },
            picture(entry.image, entry.map, `${whatIsSeen(entry.image)}: where ${c.name} responds`, true),
            h("div", { class: "caption" }, h("b", null, number(entry.value)), " ", text(whatIsSeen(entry.image)), weakness(entry.map),
              isWrong(image) ? [h("br"), "taken for ", text(image.prediction)] : null)));
        })) : h("p", { class: "note" }, "This concept was never active.")),
      h("aside", null,
        decodedPanel(c),
        section("In numbers", facts([["share of all contributions", percent(c.importance)], [`active ${where}`, `${percent(c.share_active)} of ${data.maps ? "positions" : "images"}`],
          ["mean activation", number(c.mean)], ["strongest activation", number(c.max)], ["stability over seeds", number(c.stability)], ...scores])),
        c.neighbours.length ? section("Most like it", bars(c.neighbours.map((near) => ({ label: conceptLink(near.concept), value: near.similarity,
          picture: emblem(near.concept), unsigned: true })), true),
        h("p", { class: "muted" }, data.map?.of === "codes" ? "Correlation of the codes over rows." : "Cosine of the directions; 1 is the same direction.")) : null,
        c.classes.length ? section("What it adds to classes", bars(c.classes.map((k) => ({ value: k.contribution,
          label: served(c).includes(k.class) || k.images === null ? classLink(k.class) : [classLink(k.class), h("small", { class: "muted" }, ` ${counted(k.images, "image")}`)] })))) : null,
        c.histogram && c.histogram.counts.length && c.histogram.edges.length === c.histogram.counts.length + 1
          ? section("How strongly it responds", histogram(c.histogram), h("p", { class: "muted" }, "Its strongest response in each image; heights are logarithmic.")) : null)));
}

// Pictures that a decoder made of the layer with the concept taken out, or with it alone.
function decodedPanel(concept) {
  const made = concept.decoded;
  if (!made || (made.removed === null && made.alone === null)) return null;
  const name = short(title(concept));
  const shown = [["removed", `${name} removed`], ["alone", `${name} alone`]].filter(([kind]) => made[kind] !== null);
  return section("Decoded to a picture",
    h("div", { class: "gallery" }, shown.map(([kind, told]) => h("div", { class: "tile" },
      picture(ofDecoder(made[kind]), null, `What the decoder draws with ${told}`, true), h("div", { class: "caption" }, told)))),
    made.visibility === null ? null : facts([["visibility", number(made.visibility)]]),
    made.note ? h("p", { class: "muted" }, made.note) : null);
}
