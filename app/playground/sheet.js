/** The contact sheet: all pictures of the album, newest first; chosen ones are compared. */

import { expiry, hasExpired } from "./album.js";
import { byId, element } from "./element.js";
import { hasEnded } from "./follower.js";
import { stateOf } from "./print.js";

const MOST_CHOSEN = 6;
const EXPIRY_LOOK_MS = 20_000;

/** Says `open` with detail [{id, only}] for what is to be looked at. */
export class Sheet extends EventTarget {
  #items = new Map();
  #chosen = new Set();
  #choosing = false;

  constructor(album, actions) {
    super();
    this.album = album;
    this.actions = actions;
    this.list = byId("frames");
    album.addEventListener("change", ({ detail }) => this.#changed(detail.id));
    this.list.addEventListener("click", (event) => this.#clicked(event.target.closest("button")));
    byId("choose").addEventListener("click", () => this.#choose(!this.#choosing));
    byId("compare-chosen").addEventListener("click", () => this.#compare());
    for (const id of album.ids) this.#changed(id);
    setInterval(() => this.#expire(), EXPIRY_LOOK_MS);
  }

  #changed(id) {
    const record = this.album.record(id);
    const item = this.#items.get(id);
    if (!record) {
      item?.forEach(({ node }) => node.remove());
      this.#items.delete(id);
    } else {
      const face = faceOf(record);
      if (item?.face !== face) this.#replace(id, record, face);
      else item.forEach(({ state }) => (state.textContent = short(record)));
    }
    byId("sheet").hidden = this.#items.size === 0;
    this.#showNote();
  }

  #replace(id, record, face) {
    const before = this.#items.get(id);
    const focused = before?.some(({ node }) => node.contains(document.activeElement));
    const count = record.generation.params.num_images;
    const frames = Array.from({ length: count }, (_, n) => this.#frame(record, n));
    frames.face = face;
    if (before) {
      before[0].node.before(...frames.map(({ node }) => node));
      before.forEach(({ node }) => node.remove());
    } else {
      const older = this.album.ids.find((other) => other < id && this.#items.has(other));
      const nodes = frames.map(({ node }) => node);
      if (older) this.#items.get(older)[0].node.before(...nodes);
      else this.list.append(...nodes);
    }
    this.#items.set(id, frames);
    if (focused) frames[0].node.querySelector("button").focus();
  }

  #frame({ generation, gone }, n) {
    const { id, params, images, status, model } = generation;
    const made = status === "succeeded" && !gone && !hasExpired(generation);
    const state = element("span", { class: "frame-state" }, short({ generation, gone }));
    const label = `${params.prompt}. ${model}, seed ${params.seed + n}`;
    const face = made ? this.#thumbnail(generation, images[n]) : state;
    const seed = element("span", { class: "figure" }, String(params.seed + n));
    const attributes = { type: "button", "data-id": id, "data-n": n, title: params.prompt, "aria-label": made && label };
    const button = element(
      "button",
      { ...attributes, class: made ? "frame" : "frame empty-frame" },
      element("span", { class: "frame-window" }, face),
      element("span", { class: "frame-edge" }, element("span", {}, model), seed),
    );
    if (this.#choosing && made) button.setAttribute("aria-pressed", String(this.#chosen.has(`${id} ${n}`)));
    return { node: element("li", {}, button), state };
  }

  #thumbnail(generation, { url, width, height }) {
    const img = element("img", { alt: "", width, height, loading: "lazy", decoding: "async" });
    img.addEventListener("error", () => this.actions.lost(generation.id), { once: true });
    img.src = this.actions.pictureUrl(url);
    return img;
  }

  #clicked(button) {
    if (!button) return;
    const { id, n } = button.dataset;
    const key = `${id} ${n}`;
    if (!this.#choosing) {
      this.dispatchEvent(new CustomEvent("open", { detail: [{ id, only: null }] }));
    } else if (button.hasAttribute("aria-pressed")) {
      if (this.#chosen.has(key)) this.#chosen.delete(key);
      else if (this.#chosen.size < MOST_CHOSEN) this.#chosen.add(key);
      button.setAttribute("aria-pressed", String(this.#chosen.has(key)));
      this.#showNote();
    }
  }

  #choose(on) {
    this.#choosing = on;
    this.#chosen.clear();
    byId("choose").setAttribute("aria-pressed", String(on));
    byId("choose").textContent = on ? "Never mind" : "Compare pictures";
    for (const button of this.list.querySelectorAll(".frame:not(.empty-frame)")) {
      if (on) button.setAttribute("aria-pressed", "false");
      else button.removeAttribute("aria-pressed");
    }
    this.list.classList.toggle("choosing", on);
    this.#showNote();
  }

  #compare() {
    const detail = [...this.#chosen].map((key) => key.split(" ")).map(([id, n]) => ({ id, only: Number(n) }));
    this.#choose(false);
    this.dispatchEvent(new CustomEvent("open", { detail }));
  }

  #showNote() {
    const count = this.#chosen.size;
    byId("compare-chosen").hidden = !this.#choosing;
    byId("compare-chosen").disabled = count < 2;
    byId("compare-chosen").textContent = count < 2 ? "Compare" : `Compare ${count}`;
    const choosing = count ? `${count} of at most ${MOST_CHOSEN} chosen` : `Choose 2 to ${MOST_CHOSEN} pictures`;
    byId("sheet-note").textContent = this.#choosing ? choosing : this.#keptUntil();
  }

  #keptUntil() {
    const generations = this.album.ids.map((id) => this.album.record(id).generation);
    const kept = generations.filter((one) => one.status === "succeeded" && !hasExpired(one));
    const [next] = kept.map(expiry).filter(Boolean).sort((a, b) => a - b);
    const style = { weekday: "short", hour: "2-digit", minute: "2-digit" };
    return next ? `The first of them is deleted ${next.toLocaleString([], style)}` : "";
  }

  #expire() {
    for (const id of this.album.ids) {
      if (this.#items.get(id)?.face !== faceOf(this.album.record(id))) this.actions.refresh(id);
    }
  }
}

/** What the frames of a record look like; the same: nothing to draw again. */
function faceOf({ generation, gone }) {
  return JSON.stringify([generation.status, gone, hasExpired(generation), generation.images.map(({ url }) => url)]);
}

function short({ generation, gone }) {
  const { status, progress } = generation;
  if (gone) return "Gone";
  if (status === "succeeded") return "Expired";
  if (status === "running" && progress?.step) return `${progress.step} / ${progress.steps}`;
  return hasEnded(generation) ? stateOf(generation, false) : status === "running" ? "Starting" : "Waiting";
}
