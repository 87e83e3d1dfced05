// -- what if a concept were weaker -----------------------------------------------------------------------------

// The logits with driver d at strength strengths[d] (1: as it was): a sum of straight lines where that is exact, else
// the stored point of the one driver that is not at 1.
function weakened({ exact, strengths: stored, logits, at }, strengths) {
  if (exact) return logits.map((logit, c) => logit + strengths.reduce((sum, s, d) => sum + (1 - s) * (at[d][0][c] - logit), 0));
  const moved = strengths.findIndex((s) => s !== 1);
  return moved < 0 ? logits : at[moved][stored.indexOf(strengths[moved])];
}

// How much of a logit the concepts explain; in the colour of a warning where that is less than half.
const coverage = ({ share }) => share === null || share === undefined ? null
  : h("p", { class: share < 0.5 ? "coverage against" : "coverage" }, `The concepts explain ${percent(share)} of it`, share < 0.5 ? "; most of it lies elsewhere." : ".");

function removalPanel({ removal, share }, label) {
  if (!removal || !removal.drivers.length) return null;
  const { exact, classes: names, logits, ceiling, drivers } = removal;
  const strengths = drivers.map(() => 1);
  const first = logits.indexOf(Math.max(...logits));
  const results = h("ul", { class: "bars results" }), verdict = h("p", { class: "verdict", role: "status" });
  const steps = [...removal.strengths, 1].map((s) => 100 * s).sort((a, b) => a - b);
  const sliders = drivers.map((id, d) => {
    const input = h("input", { type: "range", min: 0, max: 100, step: exact ? 1 : steps[1] - steps[0], value: 100, "aria-label": `Strength of ${short(title(concepts[id]))}`,
      on: { input: () => set(d, Number(input.value) / 100) } });
    return { input, told: h("output", { class: "value" }, "100 %") };
  });
  function set(d, strength) {
    if (!exact && strength !== 1) strengths.fill(1);
    strengths[d] = strength;
    show();
  }
  function show() {
    sliders.forEach(({ input, told }, d) => {
      input.value = 100 * strengths[d];
      told.textContent = strengths[d] === 0 ? "removed" : `${Math.round(100 * strengths[d])} %`;
      input.setAttribute("aria-valuetext", told.textContent);
    });
    const now = weakened(removal, strengths), best = now.indexOf(Math.max(...now));
    const shown = [...new Set([0, 1, 2, 3, 4, first, best].filter((c) => c < names.length))].sort((a, b) => logits[b] - logits[a]);
    const ends = [...shown.flatMap((c) => [now[c], logits[c]]), 0];
    const low = Math.min(...ends), span = Math.max(...ends) - low || 1, place = (v) => `${100 * (v - low) / span}%`;
    results.replaceChildren(...shown.map((c) => h("li", { class: c === best && "winner" }, h("span", { class: "clamp" }, classLink(names[c])),
      h("span", { class: "axis", "aria-hidden": "true" },
        h("i", { class: now[c] < 0 && "minus", css: { left: place(Math.min(0, now[c])), width: `${100 * Math.abs(now[c]) / span}%` } }),
        h("s", { css: { left: place(0) } }), h("b", { css: { left: place(logits[c]) } })),
      h("span", { class: "value" }, number(now[c])))));
    const open = ceiling !== null && ceiling > now[best];
    const changed = best !== first;
    verdict.replaceChildren(...(open ? ["A class that is not listed may be ahead here: the prediction is not known."]
      : [changed ? "The prediction turns into " : "The prediction stays ", h("b", null, text(names[best])),
        label === null ? "." : names[best] === label ? ", which is its label." : ", which is not its label."]));
  }
  const reset = h("button", { type: "button", class: "quiet", on: { click: () => { strengths.fill(1); show(); } } }, "Put all back");
  show();
  return h("section", { class: "panel removal" }, h("div", { class: "bar-tools" }, h("h2", null, "What if a concept is removed?"), reset),
    h("div", { class: "what-if" },
      h("ul", { class: "sliders" }, sliders.map(({ input, told }, d) => h("li", null, emblem(drivers[d]) ?? h("span"),
        h("span", { class: "clamp" }, conceptLink(drivers[d])), input, told))),
      h("div", null, results, verdict)),
    share !== null && share !== undefined && share < 0.5 ? h("p", { class: "coverage against" },
      `${percent(1 - share)} of this logit is in no concept and stays whatever is removed here: that the prediction stays does not say that a concept is unimportant.`) : null,
    h("p", { class: "muted" }, exact
      ? "The scores are linear in these concepts: each position is what the network answers when the concept's part is taken out and all else stays as it was. Bars are logits, the mark is the logit with nothing removed."
      : "Computed by the network at these strengths, one concept at a time (moving one puts the others back); nothing between or beyond was computed. Bars are logits, the mark is the logit with nothing removed."));
}
