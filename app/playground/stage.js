/** What is looked at now: one generation, or several side by side. */

import { byId, element } from "./element.js";
import { Print } from "./print.js";
import { keep, recallJson } from "./storage.js";

const NAME = "darkroom.stage";

export class Stage {
  #prints = [];

  constructor(album, actions) {
    this.album = album;
    this.actions = actions;
    this.node = byId("stage");
    album.addEventListener("change", ({ detail }) => this.#changed(detail.id));
    this.show(recallJson("localStorage", NAME, []));
  }

  /** Puts generations side by side. shown: [{id, only}], `only` the number of the one picture to show, or null. */
  show(shown) {
    const known = shown.filter(({ id }) => this.album.record(id));
    this.#prints = known.map(({ id, only = null }) => new Print(id, only, this.actions));
    for (const print of this.#prints) print.show(this.album.record(print.id));
    this.#arrange();
  }

  /** Shows the newest of the album if nothing is shown. */
  showSomething() {
    const [newest] = this.album.ids;
    if (!this.#prints.length && newest) this.show([{ id: newest, only: null }]);
  }

  preview(id, url) {
    for (const print of this.#prints) if (print.id === id) print.preview(url);
  }

  /** Ids of what is shown. */
  get ids() {
    return this.#prints.map(({ id }) => id);
  }

  /** Moves the eye, and the focus, here. */
  reveal() {
    this.node.focus({ preventScroll: true });
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (this.node.getBoundingClientRect().top < 0 || innerWidth < 900) {
      this.node.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
    }
  }

  #changed(id) {
    const record = this.album.record(id);
    if (!record && this.ids.includes(id)) {
      this.show(this.#prints.filter((print) => print.id !== id));
      this.showSomething();
      return;
    }
    for (const print of this.#prints) if (print.id === id) print.show(record);
    this.#markDifferences();
  }

  #arrange() {
    const box = byId("prints");
    const records = this.#prints.map(({ id }) => this.album.record(id).generation);
    const prompts = new Set(records.map(({ params }) => params.prompt));
    const oneForAll = this.#prints.length > 1 && prompts.size === 1;
    const common = oneForAll ? element("p", { class: "caption common" }, [...prompts][0]) : null;
    for (const { caption } of this.#prints) caption.hidden = oneForAll;
    const row = element("div", { class: "row", "data-count": this.#prints.length }, this.#prints.map(({ node }) => node));
    box.replaceChildren(...[common, row].filter(Boolean));
    box.hidden = !this.#prints.length;
    byId("empty").hidden = this.#prints.length > 0;
    this.#markDifferences();
    keep("localStorage", NAME, JSON.stringify(this.#prints.map(({ id, only }) => ({ id, only }))));
  }

  /** Where several lie side by side, marks the facts in which they differ. */
  #markDifferences() {
    const values = {};
    const facts = this.#prints.flatMap(({ node }) => [...node.querySelectorAll("[data-fact]")]);
    for (const { dataset, textContent } of facts) (values[dataset.fact] ??= new Set()).add(textContent);
    for (const fact of facts) {
      const { fact: name } = fact.dataset;
      fact.classList.toggle("differs", name !== "Time" && values[name].size > 1);
    }
  }
}
