// -- a metric by itself: what it is, what it was here, beside what ---------------------------------------------

const plain = (name) => name.replace(/_/g, " ");

function scorePage(index) {
  const s = data.scores[index];
  if (!s) return nothing("score", index);
  const better = s.higher_is_better === null ? "neither direction is better" : s.higher_is_better ? "higher is better" : "lower is better";
  const beside = Object.entries(s.baselines).filter(([, value]) => value !== null);
  const sentences = (s.definition ?? "").split(/(?<=[.:;]) +(?=[A-Z])/);
  const limits = sentences.filter((part) => /cannot|does not|says nothing|compare with|understates|depends on/i.test(part));
  const marks = { tie: "not distinguishable", worse: "better than this explanation", better: "" };
  return h("div", null, crumbs("scores", "scores", index > 0 ? index - 1 : undefined, data.scores[index + 1] && index + 1),
    h("h1", { tabindex: -1 }, text(plain(s.metric))),
    h("p", { class: "lede" }, sentences.filter((part) => !limits.includes(part)).join(" ") || "This run does not define it."),
    limits.length ? h("section", { class: "panel doubt" }, h("h2", null, "What it cannot show"), h("p", null, text1(limits.join(" ")))) : null,
    h("div", { class: "detail" },
      h("section", { class: "panel" }, h("h2", null, "In this run"),
        bars([{ label: h("b", null, "this explanation"), value: s.value, low: s.low, high: s.high, unsigned: true },
          ...beside.map(([name, value]) => ({ label: h("span", null, text(plain(name)), marks[s.marks[name]] ? h("span", { class: "muted" }, ` (${marks[s.marks[name]]})`) : null),
            value, plain: true, unsigned: true }))]),
        h("p", { class: "sum" }, h("span", { class: `pill ${s.standing}` }, s.told), ` ${better}.`)),
      h("aside", null,
        section("How sure", facts([["value", number(s.value)], ["95 % interval", s.low === null || s.high === null ? "none" : `${number(s.low)} to ${number(s.high)}`],
          ["counted", s.n === null ? null : s.n.toLocaleString("en")], ["seeds", s.seeds]]),
        h("p", { class: "muted" }, "The interval tells what other images and other seeds would change; a baseline inside it is not distinguishable.")),
        beside.some(([name]) => data.baselines[name]) ? section("What stands beside it", h("dl", { class: "stacked" }, beside.filter(([name]) => data.baselines[name])
          .map(([name]) => [h("dt", null, plain(name)), h("dd", null, data.baselines[name])]))) : null)));
}
const text1 = (value) => h("bdi", null, value);
