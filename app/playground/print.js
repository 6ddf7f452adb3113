/** One generation on the stage: its pictures, or how they come to be, what it was made with, and what to do with it. */

import { expiry, hasExpired } from "./album.js";
import { element, icon } from "./element.js";
import { hasEnded } from "./follower.js";
import { megapixels, ratioName } from "./shapes.js";

export class Print {
  #preview = null;
  #papersOf = "";

  /** only: the number of the one picture to show; null: all. actions: what its buttons call, by name. */
  constructor(id, only, actions) {
    this.id = id;
    this.only = only;
    this.actions = actions;
    this.title = element("h3", { class: "print-title" });
    this.papers = element("div", { class: "papers" });
    this.caption = element("p", { class: "caption" });
    this.bar = element("progress", { class: "bar", "aria-label": "Progress", max: 1, value: 0 });
    this.state = element("p", { class: "print-state" });
    this.cancel = this.#button("cancel", "Cancel", null, "secondary small");
    this.facts = element("dl", { class: "facts" });
    this.warnings = element("ul", { class: "warnings" });
    this.buttons = element(
      "div",
      { class: "print-buttons" },
      this.#button("reuse", "Use again", "again"),
      this.#button("code", "Code", "code"),
      this.#button("forget", "Delete", "bin"),
    );
    const head = element("div", { class: "print-head" }, this.title, this.state, this.cancel);
    const body = [this.papers, this.bar, this.caption, this.warnings, this.facts, this.buttons];
    this.node = element("article", { class: "print" }, head, body);
  }

  /** Shows the generation as it is now. */
  show({ generation, gone }) {
    const { model, status } = generation;
    const expired = !gone && status === "succeeded" && hasExpired(generation);
    this.node.dataset.status = gone ? "gone" : expired ? "expired" : status;
    this.title.textContent = model;
    this.node.setAttribute("aria-label", `${model}, seed ${generation.params.seed}`);
    this.caption.textContent = generation.params.prompt;
    this.state.textContent = stateOf(generation, gone);
    const open = !gone && !hasEnded(generation);
    this.cancel.hidden = !open;
    this.cancel.disabled = generation.cancel_requested;
    this.bar.hidden = !open;
    const { step, steps } = generation.progress ?? { step: 0, steps: 1 };
    this.bar.max = steps;
    this.bar.value = step;
    this.node.style.setProperty("--developed", open ? (step / steps).toFixed(3) : "1");
    if (!open) this.#preview = null;
    this.#showPapers(generation, gone || expired);
    this.#showFacts(generation);
    const notes = [...generation.warnings, ...(generation.error ? [generation.error.message] : [])];
    this.warnings.replaceChildren(...notes.map((note) => element("li", {}, note)));
  }

  /** Shows what becomes of the first picture. */
  preview(url) {
    this.#preview ??= element("img", { class: "preview", alt: "The picture so far" });
    this.#preview.src = url;
    const paper = this.papers.querySelector(".paper.blank");
    if (paper && !paper.contains(this.#preview)) paper.replaceChildren(this.#preview);
  }

  #showPapers(generation, lost) {
    const { params, images, status } = generation;
    const made = status === "succeeded" && !lost;
    const numbers = this.only === null ? [...Array(params.num_images).keys()] : [this.only];
    // Drawn again only when something else is to be seen, so that nothing flickers and focus stays
    const papersOf = JSON.stringify([made, lost, hasEnded(generation), images.map(({ url }) => url)]);
    if (papersOf === this.#papersOf) return;
    this.#papersOf = papersOf;
    this.papers.dataset.count = numbers.length;
    this.node.dataset.papers = numbers.length;
    this.node.style.setProperty("--ratio", `${params.width} / ${params.height}`);
    this.node.style.setProperty("--proportion", (params.width / params.height).toFixed(4));
    this.papers.replaceChildren(...numbers.map((n) => (made ? this.#picture(generation, n) : blank(generation, lost))));
  }

  #picture(generation, n) {
    const { url, seed, width, height } = generation.images[n];
    const img = element("img", { alt: generation.params.prompt, width, height, decoding: "async" });
    img.addEventListener("error", () => this.actions.lost(this.id), { once: true });
    img.src = this.actions.pictureUrl(url);
    const onclick = () => this.actions.view(this.id, n);
    const label = `Look at it large, seed ${seed}`;
    const button = element("button", { type: "button", class: "paper", onclick, "aria-label": label }, img);
    return element("figure", {}, button, element("figcaption", { class: "figure" }, `seed ${seed}`));
  }

  #showFacts({ params, timings, status, images }) {
    const { width, height, steps, guidance_scale: guidance, sampler, seed, num_images: count } = params;
    const seeds = this.only !== null ? images[this.only]?.seed : count > 1 ? `${seed} – ${seed + count - 1}` : seed;
    const facts = {
      Size: `${width} × ${height} · ${ratioName(width, height)} · ${megapixels(width, height)}`,
      Steps: `${steps} · ${sampler === "euler" ? "Euler" : "DPM++ 2M"}`,
      Guidance: guidance,
      Seed: seeds,
      ...(params.negative_prompt && { Without: params.negative_prompt }),
      ...(status === "succeeded" && timings.total && { Time: `${timings.total.toFixed(1)} s` }),
    };
    const rows = Object.entries(facts).map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", { class: "figure", "data-fact": name }, String(value))),
    );
    this.facts.replaceChildren(...rows);
  }

  #button(action, label, symbol, kind = "quiet") {
    const onclick = () => this.actions[action](this.id);
    return element("button", { type: "button", class: kind, "data-action": action, onclick }, symbol && icon(symbol), label);
  }
}

/** How a generation is, in a few words. */
export function stateOf(generation, gone) {
  const { status, progress, queue_position: ahead, cancel_requested: stopping } = generation;
  if (gone) return "The server no longer knows it";
  if (stopping && !hasEnded(generation)) return "Stopping at the next step";
  if (status === "queued") return ahead ? `Waiting, ${ahead} ahead` : "Waiting, next in line";
  if (status === "running") {
    if (!progress?.step) return "Reading the prompt";
    const { step, steps } = progress;
    return step < steps ? `Developing, step ${step} of ${steps}` : "Finishing";
  }
  if (status === "failed") return "It failed";
  if (status === "canceled") return "Canceled";
  if (!hasExpired(generation)) return "";
  const when = expiry(generation).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  return `Kept until ${when}, then deleted`;
}

function blank({ status }, lost) {
  const word = lost ? "Gone" : status === "failed" ? "Failed" : status === "canceled" ? "Canceled" : null;
  const text = word && element("span", { class: "blank-word" }, word);
  return element("figure", {}, element("div", { class: "paper blank" }, text));
}
