function imageTile(i) {
  const image = images[i];
  const wrong = isWrong(image);
  return h("div", { class: "tile" }, h("a", { href: `#/images/${i}` }, picture(i, null, `${whatIsSeen(i)}`, true),
    h("div", { class: "caption" }, h("b", { class: "clamp" }, text(image.prediction ?? image.id)), ` ${percent(image.probability)}`,
      wrong ? [h("br"), h("span", { class: "against" }, "labelled ", text(image.label))] : null)));
}
const imageGrid = (indices) => h("div", { class: "gallery" }, indices.map(imageTile));

const explained = images.flatMap((image, i) => image.explained ? [i] : []);
const listed = explained.length ? explained : images.map((_, i) => i);
const imageList = keep("images", () => {
  const holder = h("div"), told = h("p", { class: "count", role: "status" });
  const search = h("input", { type: "search", placeholder: "class or file name", autocomplete: "off", on: { input: show } });
  const which = h("select", { on: { change: show } }, [["", "all"], ["wrong", "mistakes"], ["right", "recognised"], ["held-out", "held-out images"]]
    .map(([value, name]) => h("option", { value }, name)));
  function show() {
    const word = search.value.toLowerCase();
    const found = listed.filter((i) => {
      const { id, label, prediction, split } = images[i];
      const fits = which.value === "wrong" ? isWrong(images[i]) : which.value === "right" ? isRight(images[i])
        : which.value === "held-out" ? split === "held-out" : true;
      return fits && [id, label ?? "", prediction ?? ""].some((part) => part.toLowerCase().includes(word));
    });
    told.textContent = `${found.length} of ${counted(listed.length, "image")}` + (found.length > 400 ? "; the first 400 are shown" : "");
    holder.replaceChildren(imageGrid(found.slice(0, 400)));
  }
  show();
  return h("div", null, h("h1", { tabindex: -1 }, "Why was it predicted?"),
    h("p", { class: "lede" }, explained.length ? "Each image opens the concepts that drove its prediction." : "The images of the galleries; none was explained by itself in this run."),
    h("div", { class: "bar-tools" }, h("label", { class: "grow" }, "Search", search), h("label", null, "Show", which)), told, holder);
});

function imagePage(index) {
  const image = images[index];
  if (!image) return nothing("image", index);
  const why = image.explained;
  const inGalleries = concepts.flatMap((c) => c.gallery.filter((entry) => entry.image === index).map((entry) => [c, entry]));
  const drivers = why ? [...why.drivers].sort((a, b) => Math.abs(b.contribution) - Math.abs(a.contribution)) : [];
  const weak = drivers.filter((d) => d.map && isWeak(d.map)), outlined = drivers.filter((d) => d.map && !weak.includes(d));
  const mapped = drivers.some((d) => d.map);
  const shown = drivers.reduce((sum, d) => sum + (d.contribution ?? 0), 0);
  const rest = why && why.logit !== null ? why.logit - (why.base ?? 0) - (why.gap ?? 0) - shown : null;
  return h("div", null, crumbs("images", "images", listed.findLast((i) => i < index), listed.find((i) => i > index)),
    h("h1", { tabindex: -1 }, why ? ["Why ", text(why.class), "?"] : text(image.prediction ?? image.id)),
    h("p", { class: "lede" }, text(image.id), image.prediction === null ? "" : [": predicted ", classLink(image.prediction), ` with ${percent(image.probability)}`],
      image.label === null ? "" : image.known ? [", labelled ", classLink(image.label)] : [", labelled ", text(image.label), ", which is no class of the network"], image.split ? `; ${image.split === "fit" ? "used to fit" : image.split}` : "", "."),
    h("div", { class: "detail" },
      h("section", null, h("div", { class: "bar-tools" }, h("h2", null, mapped ? "The concepts that drove it" : "The image"), mapped ? mapChoice() : null),
        h("div", { class: "gallery" },
          h("div", { class: "tile" }, picture(index, null, whatIsSeen(index), true), h("div", { class: "caption" }, "the image")),
          outlined.map((d) => h("div", { class: "tile" }, h("a", { href: `#/concepts/${d.concept}` },
            picture(index, d.map, `${whatIsSeen(index)}: where ${concepts[d.concept].name} responds`, true),
            h("div", { class: "caption" }, h("b", { class: d.contribution < 0 ? "against" : "for" }, number(d.contribution, true)), " ", text(title(concepts[d.concept]))))))),
        weak.length ? h("p", { class: "muted" }, "Weak everywhere in this image: ", weak.map((d, i) => [i ? ", " : "", conceptLink(d.concept), ` (${number(d.contribution, true)})`]), ".") : null),
      h("aside", null,
        why ? section("What adds up to the logit", forAndAgainst([
          ...drivers.map((d) => ({ label: conceptLink(d.concept), value: d.contribution, picture: mapped ? null : emblem(d.concept) })),
          rest !== null && Math.abs(rest) > 1e-3 * (1 + Math.abs(why.logit)) ? { label: "other concepts", value: rest } : null].filter(Boolean)),
        facts([["base, without any concept", number(why.base, true)], ["gap, in no concept", number(why.gap, true)]]),
        h("p", { class: "sum" }, "Together: the logit ", h("b", null, number(why.logit)), data.exact ? "." : ", approximately: contributions are gradient × concept."),
        coverage(why)) : null,
        inGalleries.length ? section("Among the strongest images of", h("ul", { class: "answers" }, inGalleries.map(([c, entry]) =>
          h("li", null, conceptLink(c.id), ` (${number(entry.value)})`)))) : null)),
    why ? removalPanel(why, image.known ? image.label : null) : null,
    image.downloads ? h("p", null, image.downloads.map(([name, href], i) => [i ? " · " : "", h("a", { href, download: name }, `Save ${name}`)])) : null);
}
