// -- finding the way -------------------------------------------------------------------------------------------

const lists = { concepts: atlas, classes: classList, images: imageList, mistakes: mistakesPage };
const details = { concepts: conceptPage, classes: classPage, images: imagePage, scores: scorePage };
if (data.map) lists.map = mapPage;
if (typeof tryPage !== "undefined") lists.try = tryPage; // only where netgloss serve shows the report
const written = ["scores", "method", "run"]; // pages whose text is in the file
const parent = { map: "concepts" };
const scrolled = {};
let here = null;
function route() {
  const [kind = "", index] = location.hash.replace(/^#\/?/, "").split("/");
  if (kind === "main" || location.hash === here) return;
  scrolled[here] = window.scrollY;
  const first = here === null;
  here = location.hash;
  const make = index === undefined ? lists[kind] : details[kind] && (() => details[kind](Number(index)));
  const view = make ? "page" : written.includes(kind) ? kind : "overview";
  if (make) page.replaceChildren(make());
  document.body.dataset.view = view;
  const marked = make ? parent[kind] ?? kind : view;
  document.querySelectorAll("[data-nav]").forEach((link) => {
    if (link.dataset.nav === marked) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  setMaps(document.body.dataset.maps);
  window.scrollTo(0, make && index !== undefined ? 0 : scrolled[here] ?? 0);
  if (!first) (document.querySelector(`.view[data-view="${view}"] h1`) ?? byId("main")).focus({ preventScroll: true });
}
document.querySelectorAll(".view h1").forEach((title) => title.setAttribute("tabindex", "-1"));
window.addEventListener("hashchange", route);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  if (event.key === "/") {
    event.preventDefault();
    if (!page.querySelector("input") || document.body.dataset.view !== "page") { location.hash = "#/concepts"; route(); }
    page.querySelector("input")?.focus();
  }
  const turn = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  if (turn && document.body.dataset.view === "page") page.querySelector(`[rel="${turn}"]`)?.click();
});

const root = document.documentElement, button = byId("theme");
const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const label = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-label", `${button.textContent} colours`); };
button.hidden = false;
button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
label();
document.body.classList.add("scripted");
route();
