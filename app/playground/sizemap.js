/** The map of legal shapes: across, the ratio; upwards, the area. Each dot of its grain is a shape that the model takes. */

import { drawing, element } from "./element.js";
import { RATIOS, megapixels, ratioName } from "./shapes.js";

const OCTAVES = 2; // of ratio to each side: 1:4 to 4:1
const STEP = 1 / 16; // octaves that an arrow key moves
const PAD = { left: 34, right: 12, top: 14, bottom: 27 }; // pixels around the field
const LABELLED = ["9:21", "9:16", "3:4", "1:1", "4:3", "16:9", "21:9"];
const LABEL_ROOM = 29; // pixels
const MEGA = 2 ** 20;

export class SizeMap extends EventTarget {
  #aim; // log2 of {ratio, pixels}, not rounded to a shape, so that steps do not drift
  #trained = null;

  constructor(node) {
    super();
    this.node = node;
    this.shapes = null;
    this.shape = { width: 0, height: 0 };
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.overlay = drawing("svg", { "aria-hidden": "true" });
    this.frame = element("span", { class: "map-frame", "aria-hidden": "true" });
    this.sliders = {
      ratio: this.#slider("map-ratio", "Aspect ratio", -OCTAVES * 100, OCTAVES * 100),
      pixels: this.#slider("map-area", "Area", 0, 100),
    };
    node.append(this.canvas, this.overlay, this.frame, this.sliders.ratio, this.sliders.pixels);
    node.addEventListener("pointerdown", (event) => this.#grab(event));
    node.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#draw()).observe(node);
    addEventListener("darkroom:theme", () => this.#draw());
  }

  /** Another model's shapes; `trained`: the pixels that it knows best. */
  offer(shapes, trained = null) {
    this.shapes = shapes;
    this.#trained = trained;
    this.#draw();
  }

  /** Shows a shape, legal or not. */
  show(width, height) {
    if (width !== this.shape.width || height !== this.shape.height) this.#aim = aimAt(width, height);
    this.shape = { width, height };
    this.#place();
  }

  /** Moves to a legal shape of a ratio, the area about kept. */
  turnTo(ratio) {
    const aim = { ratio: Math.log2(ratio), pixels: this.#aim.pixels };
    this.#move(aim, this.shapes.ofRatio(ratio, 2 ** aim.pixels) ?? this.shape);
  }

  #slider(id, label, min, max) {
    const input = element("input", { type: "range", id, class: "map-slider", "aria-label": label, min, max, step: 1 });
    input.addEventListener("input", () => {
      const { ratio, pixels } = this.sliders;
      this.#move({ ratio: Number(ratio.value) / 100, pixels: this.#fromHundredths(Number(pixels.value)) });
    });
    return input;
  }

  get #range() {
    return { low: Math.log2(this.shapes.minPixels), high: Math.log2(this.shapes.maxPixels) };
  }

  #fromHundredths(value) {
    const { low, high } = this.#range;
    return low + (value / 100) * (high - low);
  }

  #field() {
    const width = this.node.clientWidth - PAD.left - PAD.right;
    return { width, height: this.node.clientHeight - PAD.top - PAD.bottom };
  }

  /** Pixels of the map at which a shape, or an aim, lies. */
  #point({ ratio, pixels }) {
    const { low, high } = this.#range;
    const { width, height } = this.#field();
    const across = Math.min(1, Math.max(0, (ratio + OCTAVES) / (2 * OCTAVES)));
    const up = high > low ? Math.min(1, Math.max(0, (pixels - low) / (high - low))) : 0.5;
    return { x: PAD.left + across * width, y: PAD.top + (1 - up) * height };
  }

  #grab(event) {
    if (!this.shapes || event.button !== 0) return;
    event.preventDefault();
    this.sliders.ratio.focus({ preventScroll: true });
    this.node.setPointerCapture(event.pointerId);
    const drag = (moved) => this.#drag(moved);
    drag(event);
    this.node.addEventListener("pointermove", drag);
    for (const end of ["pointerup", "pointercancel"]) {
      this.node.addEventListener(end, () => this.node.removeEventListener("pointermove", drag), { once: true });
    }
  }

  #drag(event) {
    const box = this.node.getBoundingClientRect();
    const { width, height } = this.#field();
    const { low, high } = this.#range;
    const across = clamp((event.clientX - box.left - PAD.left) / width);
    const up = 1 - clamp((event.clientY - box.top - PAD.top) / height);
    const ratio = nearName((across * 2 - 1) * OCTAVES, (2 * OCTAVES * 5) / width);
    this.#move({ ratio, pixels: low + up * (high - low) });
  }

  #key(event) {
    const moves = {
      ArrowLeft: { ratio: -STEP },
      ArrowRight: { ratio: STEP },
      ArrowDown: { pixels: -STEP },
      ArrowUp: { pixels: STEP },
      PageDown: { pixels: -0.5 },
      PageUp: { pixels: 0.5 },
    };
    const by = moves[event.key];
    if (!by || !this.shapes || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const factor = event.shiftKey ? 4 : 1;
    this.#moveOn({ ratio: (by.ratio ?? 0) * factor, pixels: (by.pixels ?? 0) * factor });
  }

  /** Moves on in one direction until the shape is another, or the map ends. */
  #moveOn(by) {
    const before = this.shape;
    const { low, high } = this.#range;
    const aim = { ...this.#aim };
    for (let tries = 0; tries < 64; tries++) {
      aim.ratio = Math.min(OCTAVES, Math.max(-OCTAVES, aim.ratio + by.ratio));
      aim.pixels = Math.min(high, Math.max(low, aim.pixels + by.pixels));
      const shape = this.#legal(aim);
      if (shape.width !== before.width || shape.height !== before.height) break;
    }
    this.#move(aim);
  }

  #legal({ ratio, pixels }) {
    return this.shapes.nearest(2 ** ((pixels + ratio) / 2), 2 ** ((pixels - ratio) / 2)) ?? this.shape;
  }

  #move(aim, shape = this.#legal(aim)) {
    this.#aim = aim;
    this.shape = shape;
    this.#place();
    this.dispatchEvent(new Event("change"));
  }

  /** Puts the frame, in its own proportions, where the shape lies. */
  #place() {
    const { width, height } = this.shape;
    if (!this.shapes || !width || !height) return;
    const at = aimAt(width, height);
    const { x, y } = this.#point(at);
    const side = 24 * 2 ** ((at.pixels - 20) / 4);
    const [w, h] = [2 ** (at.ratio / 2), 2 ** (-at.ratio / 2)].map((factor) => side * Math.min(2, Math.max(0.5, factor)));
    const values = { "--x": x, "--y": y, "--w": w, "--h": h };
    for (const [name, value] of Object.entries(values)) this.frame.style.setProperty(name, `${value.toFixed(1)}px`);
    const { low, high } = this.#range;
    const said = `${width} by ${height}, ${ratioName(width, height)}, ${megapixels(width, height)}`;
    this.sliders.ratio.value = String(Math.round(at.ratio * 100));
    this.sliders.pixels.value = String(Math.round(((at.pixels - low) / (high - low || 1)) * 100));
    for (const slider of Object.values(this.sliders)) slider.setAttribute("aria-valuetext", said);
  }

  #draw() {
    if (!this.shapes || !this.node.clientWidth) return;
    this.#drawGrain();
    this.#drawAxes();
    this.#place();
  }

  #drawGrain() {
    const scale = devicePixelRatio || 1;
    const { clientWidth, clientHeight } = this.node;
    this.canvas.width = clientWidth * scale;
    this.canvas.height = clientHeight * scale;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    context.fillStyle = getComputedStyle(this.canvas).color;
    for (const { width, height } of this.shapes.all(2 ** OCTAVES)) {
      const { x, y } = this.#point(aimAt(width, height));
      context.fillRect(x - 0.5, y - 0.5, 1, 1);
    }
  }

  #drawAxes() {
    const { low, high } = this.#range;
    const { width, height } = this.#field();
    const [left, right, top, bottom] = [PAD.left, PAD.left + width, PAD.top, PAD.top + height];
    const lines = [];
    let labelledUpTo = 0;
    for (const [w, h] of RATIOS) {
      const { x } = this.#point({ ratio: Math.log2(w / h), pixels: low });
      const name = `${w}:${h}`;
      const class_ = name === "1:1" ? "axis strong" : "axis";
      lines.push(drawing("line", { class: class_, x1: x, x2: x, y1: top, y2: bottom }));
      if (!LABELLED.includes(name) || x < labelledUpTo) continue;
      lines.push(drawing("text", { x, y: bottom + 20, "text-anchor": "middle" }, name));
      labelledUpTo = x + LABEL_ROOM;
    }
    for (const pixels of areas(low, high)) {
      const { y } = this.#point({ ratio: 0, pixels });
      const label = `${Number((2 ** pixels / MEGA).toPrecision(2))}`;
      lines.push(drawing("line", { class: "axis", x1: left, x2: right, y1: y, y2: y }));
      lines.push(drawing("text", { x: left - 6, y: y + 3.5, "text-anchor": "end" }, label));
    }
    if (this.#trained && Math.log2(this.#trained) < high) {
      const { y } = this.#point({ ratio: 0, pixels: Math.log2(this.#trained) });
      lines.push(drawing("line", { class: "trained", x1: left, x2: right, y1: y, y2: y }));
      lines.push(drawing("text", { class: "trained", x: right - 4, y: y - 5, "text-anchor": "end" }, "trained up to here"));
    }
    this.overlay.replaceChildren(...lines);
  }
}

function aimAt(width, height) {
  return { ratio: Math.log2(width / height), pixels: Math.log2(width * height) };
}

/** The ratio with a name that lies within reach, or the ratio itself; both as log2. */
function nearName(ratio, reach) {
  const named = RATIOS.map(([w, h]) => Math.log2(w / h));
  return named.find((name) => Math.abs(name - ratio) < reach) ?? ratio;
}

/** log2 of the areas that the axis names: halves and doubles of a megapixel, and the limits. */
function areas(low, high) {
  const found = [low, high];
  for (let pixels = Math.ceil(low); pixels < high; pixels++) {
    if (found.every((other) => Math.abs(other - pixels) > 0.3)) found.push(pixels);
  }
  return found;
}

function clamp(part) {
  return Math.min(1, Math.max(0, part));
}
