const classList = keep("classes", () => h("div", null, h("h1", { tabindex: -1 }, "Classes"),
  classes.length ? h("table", { class: "table" },
    h("thead", null, h("tr", null, h("th", { scope: "col" }, "Class"), h("th", { scope: "col" }, "Images"), h("th", { scope: "col" }, "Accuracy"),
      h("th", { scope: "col" }, "Agreement"), h("th", { scope: "col", class: "chips rare" }, "Leading concepts"))),
    h("tbody", null, classes.map((k) => h("tr", null, h("th", { scope: "row" }, classLink(k.class)), h("td", null, k.num_images === null ? "–" : k.num_images.toLocaleString("en")),
      h("td", null, percent(k.accuracy)), h("td", null, percent(k.agreement)),
      h("td", { class: "chips rare" }, k.concepts.slice(0, 4).map((e) => conceptLink(e.concept)))))))
    : h("p", { class: "note" }, "This run lists no classes."),
  classes.length ? h("p", { class: "muted" }, "Agreement: how often the prediction stays the same when the layer is replaced by what the concepts rebuild of it.") : null));

function classPage(index) {
  const k = classes[index];
  if (!k) return nothing("class", index);
  const seen = images.flatMap((image, i) => image.explained && image.explained.class === k.class ? [i] : []);
  return h("div", null, crumbs("classes", "classes", index > 0 ? index - 1 : undefined, classes[index + 1] && index + 1), h("h1", { tabindex: -1 }, text(k.class)),
    h("p", { class: "lede" }, counted(k.num_images, "image"), k.accuracy === null ? "" : `, ${percent(k.accuracy)} recognised`,
      k.agreement === null ? "" : `, ${percent(k.agreement)} keep their prediction when only the concepts are left`, "."),
    h("section", { class: "panel" }, h("h2", null, "What speaks for it, and against"),
      forAndAgainst(k.concepts.map((e) => ({ label: conceptLink(e.concept), value: e.contribution, low: e.low, high: e.high,
        picture: emblem(e.concept) }))),
      h("p", { class: "sum" }, "Mean logit ", h("b", null, number(k.mean_logit)), " = base ", h("b", null, number(k.base)),
        " + all concepts + gap ", h("b", null, number(k.gap)), "; below each number is its 95 % interval.")),
    k.deletion ? deletionPanel(k.deletion) : null,
    seen.length ? [h("h2", { css: { "margin-top": "2rem" } }, "Images explained as this class"), imageGrid(seen)] : null);
}

// Each concept of the class over its strongest images, and what hiding its area costs every concept.
function deletionPanel({ concepts: own, lost, random, images: count }) {
  const cell = (value, strong) => h("td", null, strong && value !== null ? h("b", null, percent(value)) : percent(value));
  return h("section", { class: "panel" }, h("div", { class: "bar-tools" }, h("h2", null, "Where its concepts look"), mapChoice()),
    own.map((id) => concepts[id].gallery.length ? [h("h3", null, conceptLink(id)), h("div", { class: "gallery" },
      concepts[id].gallery.filter((entry) => images[entry.image].size).slice(0, 5).map((entry) => h("div", { class: "tile" }, h("a", { href: `#/images/${entry.image}` },
        picture(entry.image, entry.map, `${whatIsSeen(entry.image)}: where ${concepts[id].name} responds`, true)))))] : null),
    h("h3", null, "Hidden and lost"),
    h("p", { class: "muted" }, `The strongest fifth of a concept's heat is blurred (${counted(count, "image")}); a row tells the share that each concept loses. `
      + "If each heat shows what its concept reads, the diagonal is the largest of its column and above the last row."),
    h("div", { css: { overflowX: "auto" } }, h("table", { class: "table" },
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "hidden"), own.map((id) => h("th", { scope: "col" }, conceptLink(id))))),
      h("tbody", null, lost.map((row, i) => h("tr", null, h("th", { scope: "row" }, conceptLink(own[i])), row.map((value, j) => cell(value, i === j)))),
        h("tr", null, h("th", { scope: "row" }, "random places"), random.map((value) => cell(value, false)))))));
}
