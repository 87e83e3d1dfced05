"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const { images, concepts, classes } = data;
  const page = byId("page");
  const colours = Uint8Array.from({ length: 768 }, (_, i) => parseInt(data.heat.slice(2 * i, 2 * i + 2), 16));
  const where = data.maps ? "at" : "in";
  const classIndex = new Map(classes.map((c, i) => [c.class, i]));
  let thumbnails = null;

  // -- elements: text only ever becomes text nodes ---------------------------------------------------------------

  const SVG = "http://www.w3.org/2000/svg";
  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "on") for (const [event, f] of Object.entries(value)) element.addEventListener(event, f);
      else if (name === "css") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  }
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  const short = (value) => value.length > 120 ? value.slice(0, 119) + "…" : value;
  const text = (value) => h("bdi", { title: value.length > 120 && value }, short(value));
  const section = (title, ...children) => h("section", { class: "panel" }, h("h2", null, title), ...children);

  function number(value, signed) {
    if (value === null || value === undefined) return "–";
    value = Number(value.toPrecision(3));
    const size = Math.abs(value);
    const digits = size === 0 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(size)));
    let out = digits > 5 || size >= 1e6 ? value.toExponential(2)
      : value.toLocaleString("en", { minimumFractionDigits: Math.min(digits, 5), maximumFractionDigits: Math.min(digits, 5) });
    if (signed && value > 0) out = "+" + out;
    return out.replace(/-/g, "\u2212");
  }
  const counted = (value, noun) => value === null ? `– ${noun}s` : `${value.toLocaleString("en")} ${noun}${value === 1 ? "" : "s"}`;
  const percent = (value) => value === null || value === undefined ? "–" : value > 0 && value < 0.0005 ? "< 0.1 %"
    : (100 * value).toFixed(value >= 0.0995 || value === 0 ? 0 : 1) + " %";

  // -- concept maps: heat as a small canvas, contour as a path ---------------------------------------------------

  function decode(map) {
    const [rows, columns, packed, low, high, threshold] = map;
    const values = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    return { rows, columns, values, low, high, threshold };
  }

  // A map's values (0 to 255) at the centres of width x height cells: bilinear between its own cell centres, edges held.
  function upsample({ rows, columns, values }, width, height) {
    const out = new Float32Array(width * height);
    for (let y = 0; y < height; y++) {
      const fy = Math.min(rows - 1, Math.max(0, (y + 0.5) * rows / height - 0.5));
      const y0 = Math.floor(fy) * columns, y1 = Math.min(rows - 1, Math.floor(fy) + 1) * columns, ty = fy - Math.floor(fy);
      for (let x = 0; x < width; x++) {
        const fx = Math.min(columns - 1, Math.max(0, (x + 0.5) * columns / width - 0.5));
        const x0 = Math.floor(fx), x1 = Math.min(columns - 1, x0 + 1), tx = fx - x0;
        out[y * width + x] = (values[y0 + x0] * (1 - tx) + values[y0 + x1] * tx) * (1 - ty)
          + (values[y1 + x0] * (1 - tx) + values[y1 + x1] * tx) * ty;
      }
    }
    return out;
  }

  // The same colours as netgloss.figures.overlay_map.
  function heat(map, width, height) {
    const canvas = h("canvas", { width, height, "aria-hidden": "true" });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(width, height);
    const { low, high } = map;
    const top = Math.max(Math.abs(low), Math.abs(high)) || 1;
    upsample(map, width, height).forEach((byte, i) => {
      const value = byte / 255, strength = low < 0 ? (low + value * (high - low)) / top : value;
      const colour = 3 * Math.round(255 * (low < 0 ? (1 + strength) / 2 : value));
      for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = colours[colour + c];
      pixels.data[4 * i + 3] = 191 * Math.abs(strength);
    });
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  // Marching squares over the upsampled map, closed off at the picture's border by holding the edges.
  function contour(map, width, height) {
    const fine = 42 / Math.max(map.rows, map.columns);
    const rows = Math.max(2, Math.round(fine * map.rows)), columns = Math.max(2, Math.round(fine * map.columns));
    const values = upsample(map, columns, rows), threshold = map.threshold;
    const places = (n, size) => [0, ...Array.from({ length: n }, (_, i) => (i + 0.5) / n * size), size];
    const xs = places(columns, width), ys = places(rows, height);
    const at = (i, j) => values[Math.min(rows - 1, Math.max(0, i - 1)) * columns + Math.min(columns - 1, Math.max(0, j - 1))];
    const level = threshold - 0.5;
    const segments = [];
    for (let i = 0; i + 1 < ys.length; i++) {
      for (let j = 0; j + 1 < xs.length; j++) {
        const [a, b, c, d] = [at(i, j), at(i, j + 1), at(i + 1, j + 1), at(i + 1, j)];
        if (a > level === b > level && b > level === c > level && c > level === d > level) continue;
        const corners = [[xs[j], ys[i], a], [xs[j + 1], ys[i], b], [xs[j + 1], ys[i + 1], c], [xs[j], ys[i + 1], d]];
        const cuts = [];
        for (let k = 0; k < 4; k++) {
          const [px, py, p] = corners[k], [qx, qy, q] = corners[(k + 1) % 4];
          if (p > level !== q > level) {
            const t = (level - p) / (q - p);
            cuts.push([px + t * (qx - px), py + t * (qy - py)]);
          }
        }
        const middle = (a + b + c + d) / 4 > level;
        if (cuts.length === 4 && middle !== a > level) cuts.push(cuts.shift());
        for (let k = 0; k + 1 < cuts.length; k += 2) {
          segments.push("M" + cuts[k].map((v) => v.toFixed(1)).join(" ") + "L" + cuts[k + 1].map((v) => v.toFixed(1)).join(" "));
        }
      }
    }
    const path = segments.join("");
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "xMidYMid slice", "aria-hidden": "true" },
      svg("path", { class: "halo", d: path }), svg("path", { class: "edge", d: path }));
  }

  const drawings = new WeakMap();
  function draw(frame) {
    const job = drawings.get(frame);
    if (!job) return;
    drawings.delete(frame);
    watcher.unobserve(frame);
    thumbnails ||= byId("thumbnails").textContent.split("\n");
    const packed = thumbnails[job.image];
    const [width, height] = images[job.image].size || [100, 100];
    if (packed) {
      const kind = packed.startsWith("UklGR") ? "webp" : "jpeg";
      frame.append(h("img", { src: `data:image/${kind};base64,${packed}`, alt: job.alt, decoding: "async" }));
    }
    if (job.map) {
      const scale = 96 / Math.max(width, height);
      const map = decode(job.map);
      frame.append(heat(map, Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))));
      if (map.threshold !== null) frame.append(contour(map, width, height));
    }
  }
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
  }, { rootMargin: "400px" });
  window.addEventListener("beforeprint", () => document.querySelectorAll(".frame").forEach(draw));

  function picture(image, map, alt, keepShape) {
    const size = images[image].size;
    const frame = h("div", { class: size ? "frame" : "frame empty" });
    if (keepShape) frame.style.setProperty("aspect-ratio", size ? `${size[0]} / ${size[1]}` : "1");
    drawings.set(frame, { image, map, alt });
    watcher.observe(frame);
    return frame;
  }

  // -- parts of pages --------------------------------------------------------------------------------------------

  const served = (concept) => concept.classes.filter((k) => (k.contribution ?? 1) > 0).map((k) => k.class);
  const title = (concept) => concept.label ? concept.label.text : concept.name;
  const conceptLink = (id) => h("a", { href: `#/concepts/${id}` }, text(title(concepts[id])));
  const classLink = (name) => classIndex.has(name) ? h("a", { href: `#/classes/${classIndex.get(name)}` }, text(name)) : text(name);
  const whatIsSeen = (image) => short(images[image].label ?? images[image].prediction ?? images[image].id);

  const emblem = (id) => concepts[id].gallery.length ? picture(concepts[id].gallery[0].image, concepts[id].gallery[0].map, "") : null;

  function card(concept) {
    const lead = concept.gallery.slice(0, 4);
    const serves = served(concept).slice(0, 3);
    return h("a", { class: "card", href: `#/concepts/${concept.id}` },
      h("div", { class: "mosaic" }, lead.map((entry) => picture(entry.image, entry.map, ""))),
      h("div", { class: "body" },
        h("h3", { class: "clamp" }, text(title(concept)), concept.label ? h("small", null, " ", text(concept.name)) : null),
        h("p", { class: "clamp" }, serves.length ? ["for ", serves.flatMap((name, i) => i ? [", ", text(name)] : [text(name)])] : "serves no class here"),
        h("p", null, `active ${where} ${percent(concept.share_active)}`, concept.stability === null ? "" : ` · stability ${number(concept.stability)}`),
        meter(concept.importance)));
  }
  const mostImportant = Math.max(1e-12, ...concepts.map((c) => Math.abs(c.importance ?? 0)));
  const meter = (importance) => h("div", { class: "meter", title: "share of all that concepts add to predictions" },
    h("div", { class: "track" }, h("i", { css: { width: `${100 * Math.abs(importance ?? 0) / mostImportant}%` } })),
    h("span", null, percent(importance)));

  // Bars from a common zero; entries {label, value, low, high, picture, plain}.
  function bars(entries, pictured) {
    const ends = entries.flatMap((e) => [e.value, e.low, e.high]).filter((v) => v !== null && v !== undefined);
    const low = Math.min(0, ...ends), high = Math.max(0, ...ends), span = high - low || 1;
    const place = (value) => `${100 * (value - low) / span}%`;
    const width = (a, b) => `${100 * Math.abs(a - b) / span}%`;
    return h("ul", { class: pictured ? "bars pictured" : "bars" }, entries.map((e) => h("li", null,
      pictured ? e.picture ?? h("span") : null,
      h("span", { class: "clamp" }, e.label),
      h("span", { class: "axis", "aria-hidden": "true" },
        h("i", { class: e.plain ? "plain" : e.value < 0 ? "minus" : "", css: { left: place(Math.min(0, e.value ?? 0)), width: width(e.value ?? 0, 0) } }),
        e.low !== null && e.low !== undefined && e.high !== null && e.high !== undefined
          ? h("u", { css: { left: place(e.low), width: width(e.low, e.high) } }) : null,
        h("s", { css: { left: place(0) } })),
      h("span", { class: "value" }, number(e.value, true)))));
  }

  function histogram({ edges, counts }) {
    const most = Math.log1p(Math.max(1, ...counts)), span = edges.at(-1) - edges[0] || 1;
    const x = (value) => 8 + 284 * (value - edges[0]) / span;
    return svg("svg", { class: "histogram", viewBox: "0 0 300 112", role: "img",
      "aria-label": `Histogram of the activation from ${number(edges[0])} to ${number(edges.at(-1))}; the fullest bin holds ${Math.max(...counts)}` },
    counts.map((count, i) => svg("rect", { x: x(edges[i]), width: Math.max(0.5, x(edges[i + 1]) - x(edges[i]) - 0.7),
      y: 94 - 84 * Math.log1p(count) / most, height: 84 * Math.log1p(count) / most },
    svg("title", null, `${number(edges[i])} to ${number(edges[i + 1])}: ${count}`))),
    svg("line", { x1: 8, x2: 292, y1: 94.5, y2: 94.5 }),
    svg("text", { x: 8, y: 107 }, number(edges[0])),
    svg("text", { x: 292, y: 107, "text-anchor": "end" }, number(edges.at(-1))));
  }

  const facts = (pairs) => h("dl", { class: "facts" }, pairs.filter((pair) => pair[1] !== null && pair[1] !== undefined && pair[1] !== "–")
    .map(([name, value]) => h("div", null, h("dt", null, text(name)), h("dd", null, value))));

  function mapChoice() {
    const choices = [["heat", "Heat"], ["outline", "Outline"], ["photo", "Photo"]];
    const group = h("div", { class: "segments", role: "group", "aria-label": "Show on pictures" },
      choices.map(([mode, label]) => h("button", { type: "button", "data-mode": mode, "aria-pressed": document.body.dataset.maps === mode,
        on: { click: () => setMaps(mode) } }, label)));
    return group;
  }
  function setMaps(mode) {
    document.body.dataset.maps = mode;
    document.querySelectorAll("[data-mode]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.mode === mode));
  }

  function crumbs(kind, label, before, after) {
    const step = (to, name, rel) => to !== undefined ? h("a", { href: `#/${kind}/${to}`, rel }, name) : null;
    return h("div", { class: "crumbs" }, h("a", { href: `#/${kind}` }, `All ${label}`),
      h("span", null, step(before, "← previous", "prev"), step(after, "next →", "next")));
  }

  // -- pages -----------------------------------------------------------------------------------------------------

  const kept = {};
  const keep = (name, make) => () => (kept[name] ||= make());

  const orders = {
    importance: ["Importance", (c) => -Math.abs(c.importance ?? 0)],
    activity: ["How often active", (c) => -(c.share_active ?? 0)],
    strength: ["Strongest activation", (c) => -(c.max ?? 0)],
    stability: ["Stability over seeds", (c) => -(c.stability ?? -1)],
    number: ["Number", (c) => c.id],
  };
  const ranked = (order) => [...concepts].sort((a, b) => orders[order][1](a) - orders[order][1](b) || a.id - b.id);

  const atlas = keep("atlas", () => {
    const cards = concepts.map(card);
    const haystacks = concepts.map((c) => [c.name, c.label?.text ?? "", ...served(c)].join("\n").toLowerCase());
    const grid = h("div", { class: "atlas" });
    const told = h("p", { class: "count", role: "status" });
    const search = h("input", { type: "search", placeholder: "name, label or class", autocomplete: "off", on: { input: () => show(false) } });
    const order = h("select", { on: { change: () => show(true) } }, Object.entries(orders).map(([key, [name]]) => h("option", { value: key }, name)));
    const filter = h("select", { on: { change: () => show(false) } }, h("option", { value: "" }, "every class"),
      [...new Set(concepts.flatMap(served))].sort().map((name) => h("option", { value: name }, short(name))));
    function show(reorder) {
      if (reorder) grid.append(...ranked(order.value).map((c) => cards[c.id]));
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const c of concepts) {
        const fits = words.every((word) => haystacks[c.id].includes(word)) && (!filter.value || served(c).includes(filter.value));
        cards[c.id].hidden = !fits;
        shown += fits;
      }
      told.textContent = (shown === concepts.length ? "" : `${shown} of `) + counted(concepts.length, "concept");
    }
    show(true);
    return h("div", null, h("h1", { tabindex: -1 }, "Concepts"),
      h("div", { class: "bar-tools" }, h("label", { class: "grow" }, "Search", search), h("label", null, "Sort by", order),
        h("label", null, "That serve", filter), mapChoice()), told, grid);
  });

  function conceptPage(id) {
    const c = concepts[id];
    if (!c) return nothing("concept", id);
    const scores = Object.entries(c.scores).map(([name, value]) => [name.replace(/_/g, " "), number(value)]);
    return h("div", null, crumbs("concepts", "concepts", concepts[id - 1]?.id, concepts[id + 1]?.id),
      h("h1", { tabindex: -1 }, text(title(c))),
      c.label ? h("p", { class: "lede" }, text(c.name), ", labelled by evidence", c.label.metric ? [": ", text(c.label.metric), ` ${number(c.label.value)}`] : "") : null,
      h("div", { class: "detail" },
        h("section", null,
          h("div", { class: "bar-tools" }, h("h2", null, "Where it is strongest"), mapChoice()),
          c.gallery.length ? h("div", { class: "gallery" }, c.gallery.map((entry) => {
            const image = images[entry.image];
            return h("div", { class: "tile" }, h("a", { href: `#/images/${entry.image}` },
              picture(entry.image, entry.map, `${whatIsSeen(entry.image)}: where ${c.name} responds`, true),
              h("div", { class: "caption" }, h("b", null, number(entry.value)), " ", text(whatIsSeen(entry.image)),
                image.label !== null && image.prediction !== null && image.label !== image.prediction ? [h("br"), "taken for ", text(image.prediction)] : null)));
          })) : h("p", { class: "note" }, "This concept was never active.")),
        h("aside", null,
          section("In numbers", facts([["share of all contributions", percent(c.importance)], [`active ${where}`, `${percent(c.share_active)} of ${data.maps ? "positions" : "images"}`],
            ["mean activation", number(c.mean)], ["strongest activation", number(c.max)], ["stability over seeds", number(c.stability)], ...scores])),
          c.classes.length ? section("What it adds to classes", bars(c.classes.map((k) => ({ label: classLink(k.class), value: k.contribution })))) : null,
          c.histogram && c.histogram.counts.length && c.histogram.edges.length === c.histogram.counts.length + 1
            ? section("How strongly it responds", histogram(c.histogram), h("p", { class: "muted" }, "Its strongest response in each image; heights are logarithmic.")) : null)));
  }

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
        bars(k.concepts.map((e) => ({ label: conceptLink(e.concept), value: e.contribution, low: e.low, high: e.high,
          picture: emblem(e.concept) })), true),
        h("p", { class: "sum" }, "Mean logit ", h("b", null, number(k.mean_logit)), " = base ", h("b", null, number(k.base)),
          " + all concepts + gap ", h("b", null, number(k.gap)), "; the lines across the bars are intervals.")),
      k.deletion ? deletionPanel(k.deletion) : null,
      seen.length ? [h("h2", { css: { "margin-top": "2rem" } }, "Images explained as this class"), imageGrid(seen)] : null);
  }

  // Each concept of the class over its strongest images, and what hiding its area costs every concept.
  function deletionPanel({ concepts: own, lost, random, images: count }) {
    const cell = (value, strong) => h("td", null, strong && value !== null ? h("b", null, percent(value)) : percent(value));
    return h("section", { class: "panel" }, h("div", { class: "bar-tools" }, h("h2", null, "Where its concepts look"), mapChoice()),
      own.map((id) => concepts[id].gallery.length ? [h("h3", null, conceptLink(id)), h("div", { class: "gallery" },
        concepts[id].gallery.slice(0, 5).map((entry) => h("div", { class: "tile" }, h("a", { href: `#/images/${entry.image}` },
          picture(entry.image, entry.map, `${whatIsSeen(entry.image)}: where ${concepts[id].name} responds`, true)))))] : null),
      h("h3", null, "Hidden and lost"),
      h("p", { class: "muted" }, `The strongest fifth of a concept's heat is blurred (${counted(count, "image")}); a row tells the share that each concept loses. `
        + "If each heat shows what its concept reads, the diagonal is the largest of its column and above the last row."),
      h("div", { css: { overflowX: "auto" } }, h("table", { class: "table" },
        h("thead", null, h("tr", null, h("th", { scope: "col" }, "hidden"), own.map((id) => h("th", { scope: "col" }, conceptLink(id))))),
        h("tbody", null, lost.map((row, i) => h("tr", null, h("th", { scope: "row" }, conceptLink(own[i])), row.map((value, j) => cell(value, i === j)))),
          h("tr", null, h("th", { scope: "row" }, "random places"), random.map((value) => cell(value, false)))))));
  }

  function imageTile(i) {
    const image = images[i];
    const wrong = image.label !== null && image.prediction !== null && image.label !== image.prediction;
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
        const fits = which.value === "wrong" ? label !== null && label !== prediction : which.value === "right" ? label === prediction
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
    const mapped = drivers.some((d) => d.map);
    const shown = drivers.reduce((sum, d) => sum + (d.contribution ?? 0), 0);
    const rest = why && why.logit !== null ? why.logit - (why.base ?? 0) - (why.gap ?? 0) - shown : null;
    return h("div", null, crumbs("images", "images", listed.findLast((i) => i < index), listed.find((i) => i > index)),
      h("h1", { tabindex: -1 }, why ? ["Why ", text(why.class), "?"] : text(image.prediction ?? image.id)),
      h("p", { class: "lede" }, text(image.id), image.prediction === null ? "" : [": predicted ", classLink(image.prediction), ` with ${percent(image.probability)}`],
        image.label === null ? "" : [", labelled ", classLink(image.label)], image.split ? `; ${image.split === "fit" ? "used to fit" : image.split}` : "", "."),
      h("div", { class: "detail" },
        h("section", null, h("div", { class: "bar-tools" }, h("h2", null, mapped ? "The concepts that drove it" : "The image"), mapped ? mapChoice() : null),
          h("div", { class: "gallery" },
            h("div", { class: "tile" }, picture(index, null, whatIsSeen(index), true), h("div", { class: "caption" }, "the image")),
            drivers.filter((d) => d.map).map((d) => h("div", { class: "tile" }, h("a", { href: `#/concepts/${d.concept}` },
              picture(index, d.map, `${whatIsSeen(index)}: where ${concepts[d.concept].name} responds`, true),
              h("div", { class: "caption" }, h("b", { class: d.contribution < 0 ? "against" : "for" }, number(d.contribution, true)), " ", text(title(concepts[d.concept])))))))),
        h("aside", null,
          why ? section("What adds up to the logit", bars([
            ...drivers.map((d) => ({ label: conceptLink(d.concept), value: d.contribution, picture: mapped ? null : emblem(d.concept) })),
            rest !== null && Math.abs(rest) > 1e-3 * (1 + Math.abs(why.logit)) ? { label: "other concepts", value: rest } : null,
            why.base === null ? null : { label: "base", value: why.base, plain: true },
            why.gap === null ? null : { label: "gap", value: why.gap, plain: true }].filter(Boolean), !mapped),
          h("p", { class: "sum" }, "Together: the logit ", h("b", null, number(why.logit)), data.exact ? "." : ", approximately: contributions are gradient × concept.")) : null,
          inGalleries.length ? section("Among the strongest images of", h("ul", { class: "answers" }, inGalleries.map(([c, entry]) =>
            h("li", null, conceptLink(c.id), ` (${number(entry.value)})`)))) : null)));
  }

  const nothing = (kind, index) => h("p", { class: "note" }, `This report has no ${kind} ${index}.`);

  // -- finding the way -------------------------------------------------------------------------------------------

  const lists = { concepts: atlas, classes: classList, images: imageList };
  const details = { concepts: conceptPage, classes: classPage, images: imagePage };
  const scrolled = {};
  let here = null;
  function route() {
    const [kind = "", index] = location.hash.replace(/^#\/?/, "").split("/");
    if (kind === "main") return;
    scrolled[here] = window.scrollY;
    const first = here === null;
    here = location.hash;
    const fixed = !(kind in lists);
    const view = fixed ? (["scores", "run"].includes(kind) ? kind : "overview") : "page";
    if (!fixed) page.replaceChildren(index === undefined ? lists[kind]() : details[kind](Number(index)));
    document.body.dataset.view = view;
    document.querySelectorAll("[data-nav]").forEach((link) => {
      if (link.dataset.nav === (fixed ? view : kind)) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    });
    setMaps(document.body.dataset.maps);
    window.scrollTo(0, fixed || index === undefined ? scrolled[here] ?? 0 : 0);
    if (!first) (document.querySelector(`.view[data-view="${view}"] h1`) ?? byId("main")).focus({ preventScroll: true });
  }
  document.querySelectorAll(".view h1").forEach((title) => title.setAttribute("tabindex", "-1"));
  document.querySelector("#leading .atlas").append(...ranked("importance").slice(0, 6).map(card));
  if (!concepts.length) byId("leading").hidden = true;
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
})();
