/** Which models draw: one, or several to compare. */

import { byId, element } from "./element.js";

export class ModelPicker extends EventTarget {
  #cards = new Map();
  #chosen = [];

  constructor() {
    super();
    this.list = byId("models");
    this.compare = byId("compare");
    this.compare.addEventListener("change", () => this.#compareChanged());
    this.list.addEventListener("change", () => this.#choiceChanged());
  }

  /** The cards of the chosen models. */
  get chosen() {
    return this.#chosen.map((name) => this.#cards.get(name)).filter(Boolean);
  }

  card(name) {
    return this.#cards.get(name);
  }

  /** Chooses models by name; those not there are passed over. */
  choose(names) {
    const known = names.filter((name) => this.#cards.has(name));
    if (!known.length) return;
    this.compare.checked = known.length > 1;
    this.#chosen = known;
    this.#draw();
    this.#tell();
  }

  /** Shows the cards; keeps the choice as far as it still exists. */
  offer(cards) {
    const shown = JSON.stringify([...this.#cards.values()]);
    if (shown === JSON.stringify(cards)) return;
    this.#cards = new Map(cards.map((card) => [card.name, card]));
    const kept = this.#chosen.filter((name) => this.#cards.has(name));
    const first = cards.find((card) => card.loaded) ?? cards[0];
    this.#chosen = kept.length || !first ? kept : [first.name];
    byId("compare-switch").hidden = cards.length < 2;
    this.#draw();
    this.#tell();
  }

  #compareChanged() {
    if (!this.compare.checked) this.#chosen = this.#chosen.slice(0, 1);
    this.#draw();
    this.#tell();
  }

  #choiceChanged() {
    const checked = [...this.list.querySelectorAll("input:checked")].map((input) => input.value);
    this.#chosen = checked;
    this.#tell();
  }

  #tell() {
    this.dispatchEvent(new Event("change"));
  }

  #draw() {
    const focused = document.activeElement?.closest?.("#models") && document.activeElement.value;
    this.list.replaceChildren(...[...this.#cards.values()].map((card) => this.#option(card)));
    if (focused) this.list.querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
  }

  #option(card) {
    const type = this.compare.checked ? "checkbox" : "radio";
    const checked = this.#chosen.includes(card.name);
    const state = card.loaded ? "loaded" : "not loaded: pictures wait for a worker";
    const id = `model-${card.name.replaceAll(/[^\w-]/g, "_")}`;
    const bulb = { class: `bulb ${card.loaded ? "lit" : ""}`, title: state };
    return element(
      "label",
      { class: "model" },
      element("input", { type, name: "model", value: card.name, checked, "aria-describedby": `${id}-facts` }),
      element("span", bulb, element("span", { class: "unseen" }, state)),
      element("span", { class: "model-name" }, card.name),
      element("span", { class: "model-facts figure", id: `${id}-facts` }, facts(card)),
      element("span", { class: "model-text", title: card.description }, card.description),
    );
  }
}

function facts({ parameters, defaults }) {
  const size = parameters >= 1e9 ? `${(parameters / 1e9).toFixed(1)} B` : `${Math.max(1, Math.round(parameters / 1e6))} M`;
  return `${size} · ${defaults.steps} steps`;
}
