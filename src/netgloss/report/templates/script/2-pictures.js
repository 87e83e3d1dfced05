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
  const canvas = h("canvas", { class: "heat", width, height, "aria-hidden": "true" });
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

// The surroundings of the outline, darkened: the same rule as in netgloss.figures.overlay.outline_map.
function dimmed(map, width, height) {
  const canvas = h("canvas", { class: "dim", width, height, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  upsample(map, width, height).forEach((byte, i) => {
    pixels.data[4 * i + 3] = 153 * Math.min(1, Math.max(0, (map.threshold - byte) / (255 / 12)));
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}
// Whether a concept's map stays below its outline in this picture, or touches it in too small a place to be drawn.
const isWeak = (packedMap) => { const map = decode(packedMap); return map.threshold !== null && map.values.every((v) => v < map.threshold + 8); };

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
  const source = job.image.source();
  const [width, height] = job.image.size || [100, 100];
  if (source) frame.append(h("img", { src: source, alt: job.alt, decoding: "async" }));
  if (job.map) {
    const scale = 96 / Math.max(width, height);
    const map = decode(job.map);
    const size = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
    frame.append(heat(map, ...size));
    if (map.threshold !== null) frame.append(dimmed(map, ...size), contour(map, width, height));
  }
}
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
}, { rootMargin: "400px" });
window.addEventListener("beforeprint", () => document.querySelectorAll(".frame").forEach(draw));

// Where a picture's bytes are: the page's thumbnails in their order, or the picture itself (an uploaded one).
function packed(place) {
  const bytes = (thumbnails ||= byId("thumbnails").textContent.split("\n"))[place];
  return bytes ? `data:image/${bytes.startsWith("UklGR") ? "webp" : "jpeg"};base64,${bytes}` : "";
}
const ofImage = (i) => ({ size: images[i].size, source: () => images[i].source ?? packed(i) });
const ofDecoder = (i) => ({ size: data.pictures[i].size, source: () => packed(numThumbnails + i) });

function picture(image, map, alt, keepShape) {
  const shown = typeof image === "number" ? ofImage(image) : image;
  const frame = h("div", { class: shown.size ? "frame" : "frame empty" });
  if (shown.size) frame.style.setProperty("--stored", `${shown.size[0]}px`);
  if (keepShape) frame.style.setProperty("aspect-ratio", shown.size ? `${shown.size[0]} / ${shown.size[1]}` : "1");
  drawings.set(frame, { image: shown, map, alt });
  watcher.observe(frame);
  return frame;
}
