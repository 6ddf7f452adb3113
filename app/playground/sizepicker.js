/** The size of the form: its map, its ratios and its two numbers, which all say the same. */

import { byId, element } from "./element.js";
import { RATIOS, Shapes, megapixels, ratioName } from "./shapes.js";
import { SizeMap } from "./sizemap.js";

export class SizePicker extends EventTarget {
  constructor() {
    super();
    this.map = new SizeMap(byId("map"));
    this.inputs = { width: byId("width"), height: byId("height") };
    this.shapes = null;
    this.buttons = RATIOS.map((ratio) => this.#ratioButton(ratio));
    byId("ratios").append(...this.buttons);
    this.map.addEventListener("change", () => this.set(this.map.shape.width, this.map.shape.height));
    byId("turn").addEventListener("click", () => this.set(this.height, this.width));
    for (const input of Object.values(this.inputs)) {
      input.addEventListener("input", () => this.#typed());
    }
  }

  get width() {
    return Number(this.inputs.width.value);
  }

  get height() {
    return Number(this.inputs.height.value);
  }

  /** The shapes of the models of these cards; the shape is kept, or the legal one nearest to it taken. */
  offer(cards) {
    this.shapes = new Shapes(...cards.map((card) => card.limits));
    for (const input of Object.values(this.inputs)) {
      Object.assign(input, { min: this.shapes.minSide, max: this.shapes.maxSide, step: this.shapes.multiple });
    }
    const trained = cards.map((card) => card.trained_pixels).filter(Boolean);
    this.map.offer(this.shapes, trained.length ? Math.min(...trained) : null);
    const { defaults } = cards[0];
    const { width, height } = this.width > 0 && this.height > 0 ? this : defaults;
    const shape = this.shapes.problem(width, height) ? this.shapes.nearest(width, height) : { width, height };
    if (shape) this.set(shape.width, shape.height);
  }

  set(width, height) {
    this.inputs.width.value = width;
    this.inputs.height.value = height;
    this.#typed();
  }

  /** {field, message} of a shape that no chosen model takes; null. */
  problem() {
    return this.shapes?.problem(this.width, this.height) ?? null;
  }

  #typed() {
    const { width, height } = this;
    const name = width > 0 && height > 0 ? ratioName(width, height) : "";
    if (name) this.map.show(width, height);
    byId("size-text").textContent = name ? `${width} × ${height} · ${name} · ${megapixels(width, height)}` : "";
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.value === name));
    this.dispatchEvent(new Event("change"));
  }

  #ratioButton([w, h]) {
    const name = `${w}:${h}`;
    const onclick = () => this.map.turnTo(w / h);
    return element("button", { type: "button", class: "ratio", value: name, onclick, "aria-pressed": "false" }, name);
  }
}
