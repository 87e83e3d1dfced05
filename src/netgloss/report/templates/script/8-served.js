// -- explain an image: only where netgloss serve shows the report ----------------------------------------------

const LARGEST_UPLOAD = 20e6;

const tryPage = keep("try", () => {
  const told = h("p", { class: "note", role: "status" }, "JPEG, PNG, WebP, GIF, BMP or TIFF, up to 20 MB.");
  const done = h("div", { class: "gallery" });
  const input = h("input", { type: "file", accept: "image/*", id: "upload", on: { change: () => { if (input.files[0]) send(input.files[0]); } } });
  const zone = h("label", { class: "drop", for: "upload" }, h("b", null, "Choose an image"), h("span", { class: "muted" }, "or drop one here"), input);
  for (const event of ["dragover", "dragleave", "drop"]) zone.addEventListener(event, (e) => {
    e.preventDefault();
    zone.classList.toggle("over", event === "dragover");
    if (event === "drop" && e.dataTransfer.files[0]) send(e.dataTransfer.files[0]);
  });
  async function send(file) {
    if (file.size > LARGEST_UPLOAD) return told.replaceChildren(text(file.name), " is larger than 20 MB.");
    told.replaceChildren("Explaining ", text(file.name), " …");
    let answer;
    try {
      const response = await fetch("/explain", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
      answer = await response.json();
    } catch {
      answer = { error: "netgloss does not answer; is it still running?" };
    }
    input.value = "";
    if (answer.error) return told.replaceChildren(text(file.name), ": ", text(answer.error));
    const as = (type, body) => `data:${type};base64,${body}`;
    images.push({ ...answer.image, id: file.name, source: as("image/png", answer.picture),
      downloads: [["explanation.png", as("image/png", answer.figure)], ["explanation.json", as("application/json", answer.numbers)]] });
    listed.push(images.length - 1);
    delete kept.images;
    told.replaceChildren(text(file.name), " is explained.");
    done.prepend(imageTile(images.length - 1));
    location.hash = `#/images/${images.length - 1}`;
  }
  return h("div", null, h("h1", { tabindex: -1 }, "Explain an image"),
    h("p", { class: "lede" }, "The classifier looks at it, and the saved concepts say what drove its answer."), zone, told, done);
});
