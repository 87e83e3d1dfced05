// -- mistakes, by the concept that drove them ------------------------------------------------------------------

const mistakesPage = keep("mistakes", () => {
  const { labelled, wrong, groups } = data.mistakes ?? { labelled: 0, wrong: 0, groups: [] };
  const listed = groups.reduce((sum, group) => sum + group.count, 0);
  const lede = !labelled ? "No image of this run has a label that the classifier knows, so its mistakes are not known."
    : !wrong ? `All ${counted(labelled, "labelled image")} were recognised.`
    : `${wrong.toLocaleString("en")} of ${counted(labelled, "labelled image")} were taken for another class. Each mistake is counted under the concept that speaks most for the wrong class and against the right one.`;
  return h("div", null, h("h1", { tabindex: -1 }, "What drives its mistakes"), h("p", { class: "lede" }, lede),
    groups.map((group) => mistakeGroup(group, wrong)),
    listed < wrong ? h("p", { class: "note" }, `${counted(wrong - listed, "more mistake")} in smaller groups.`) : null,
    data.unmatched.length ? unmatchedPanel() : null);
});

// Folders whose name is no class of the network.
const unmatchedPanel = () => section("Not counted: labels that are no class of the network",
  h("p", { class: "muted" }, "Whether these images are recognised is not known. Rename the folders, or give the network's names by --class-names."),
  h("div", { class: "wide", tabindex: 0 }, h("table", { class: "table" }, h("thead", null, h("tr", null, h("th", { scope: "col" }, "Label"), h("th", { scope: "col" }, "Images"),
    h("th", { scope: "col" }, "Nearest class"), h("th", { scope: "col" }, "Most often predicted"))),
  h("tbody", null, data.unmatched.slice(0, 100).map((u) => h("tr", null, h("th", { scope: "row" }, text(u.label)), h("td", null, u.images.toLocaleString("en")),
    h("td", null, u.nearest === null ? "–" : text(u.nearest)), h("td", null, u.prediction === null ? "–" : [text(u.prediction), ` (${u.predicted})`])))))));

function mistakeGroup({ concept, count, share, pairs, images: shown, recognised_without: mended, replayed }, wrong) {
  const told = concept === null
    ? ["The concepts do not tell why: what they leave over (base and gap) speaks ", h("b", null, number(share, true)), " on average for the wrong class, more than any of them."]
    : ["It adds ", h("b", null, number(share, true)), " more on average to the logit of the wrong class than to that of the right one."];
  const test = concept !== null && replayed ? ` With it removed, ${mended} of the ${replayed} that ${replayed === 1 ? "was" : "were"} tried ${mended === 1 ? "is" : "are"} recognised.` : "";
  return h("section", { class: "panel mistakes" },
    h("div", { class: "heading" }, concept === null ? null : emblem(concept),
      h("div", null, h("h2", null, concept === null ? "Not explained by the concepts" : conceptLink(concept), " ",
        h("small", { class: "muted" }, `${count} of ${counted(wrong, "mistake")}`)),
      h("p", null, told, test))),
    h("ul", { class: "pairs" }, pairs.map((pair) => h("li", null, classLink(pair.label), " taken for ", classLink(pair.prediction), pair.count > 1 ? ` (${pair.count} times)` : ""))),
    shown.length ? imageGrid(shown) : null);
}
