// -- the first screen: what it looks at, and why two images were predicted as they were ------------------------

const leadingCard = (concept) => h("a", { class: "card", href: `#/concepts/${concept.id}` },
  mosaic(concept, 2),
  h("div", { class: "body" }, h("h3", { class: "clamp" }, text(title(concept))), h("p", null, text(concept.sentence))));

// One recognised image and one mistake, the surest ones; held-out images first.
function telling(fits) {
  const found = explained.filter((i) => fits(images[i]) && images[i].explained.drivers.length && images[i].size);
  const order = (i) => (images[i].split === "held-out" ? 1 : 0) + (images[i].probability ?? 0);
  return found.sort((a, b) => order(b) - order(a))[0];
}

function whyPanel(index, heading) {
  const image = images[index], why = image.explained;
  const leading = [...why.drivers].sort((a, b) => b.contribution - a.contribution).find((d) => d.map && d.contribution > 0);
  return h("article", { class: "panel why" },
    h("a", { href: `#/images/${index}`, class: "subject" }, picture(index, leading?.map, whatIsSeen(index), true)),
    h("div", { class: "about" }, h("h3", null, heading, " ", h("a", { href: `#/images/${index}` }, text(image.prediction ?? why.class)), ` ${percent(image.probability)}`),
      image.label === null ? null : h("p", { class: "muted" }, isWrong(image) ? "It is labelled " : image.known ? "Labelled " : "In the folder ", text(image.label), "."), coverage(why)),
    forAndAgainst(why.drivers.map((d) => ({ label: conceptLink(d.concept), value: d.contribution, picture: d.map && !isWeak(d.map) ? picture(index, d.map, "") : emblem(d.concept) })), 3));
}

function overview() {
  byId("leading").hidden = !concepts.length;
  document.querySelector(".leading").append(...ranked("importance").slice(0, 6).map(leadingCard));
  if (data.maps) byId("leading-title").after(mapChoice());
  const right = telling(isRight), wrong = telling(isWrong);
  const any = right ?? telling(() => true);
  const shown = [any === undefined ? null : whyPanel(any, right === undefined ? "Taken for" : "Recognised as"),
    wrong === undefined || wrong === any ? null : whyPanel(wrong, "Taken for")].filter(Boolean);
  byId("why").hidden = !shown.length;
  document.querySelector(".whys").append(...shown);
}
overview();
