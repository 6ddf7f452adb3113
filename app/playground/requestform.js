/** The form: what is asked for, kept over a reload, and each refusal beside the field at fault. */

import { byId, element } from "./element.js";
import { ModelPicker } from "./modelpicker.js";
import { SizePicker } from "./sizepicker.js";
import { keep, recallJson } from "./storage.js";

const NAME = "darkroom.request";
const MAX_SEED = 2 ** 53 - 5;
const TEXTS = ["prompt", "negative_prompt", "seed", "sampler", "output_format"];
const DIALS = ["steps", "guidance_scale"];
const FIELDS = [...TEXTS, "model", "width", "height", ...DIALS, "num_images"];

export class RequestForm extends EventTarget {
  #modelNames = "";
  #restored = recallJson("localStorage", NAME, {});

  constructor() {
    super();
    this.form = byId("request");
    this.models = new ModelPicker();
    this.size = new SizePicker();
    this.lock = byId("seed-lock");
    for (const name of DIALS) this.#couple(byId(name), byId(`${name}-range`));
    this.#wire();
    this.#restore(this.#restored);
  }

  #wire() {
    this.models.addEventListener("change", () => this.#modelsChanged());
    this.lock.addEventListener("click", () => this.#setLock(this.lock.getAttribute("aria-pressed") !== "true"));
    byId("seed").addEventListener("input", () => this.#setLock(byId("seed").value.trim() !== ""));
    this.form.addEventListener("input", (event) => this.#edited(event.target));
    this.form.addEventListener("change", () => this.#save());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.dispatchEvent(new Event("develop"));
    });
    byId("prompt").addEventListener("keydown", (event) => {
      const isHeld = event.repeat; // a key that is held down asks once
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !isHeld) this.form.requestSubmit();
    });
  }

  /** Model cards, as the server has them now. What was kept or typed before the first came stays. */
  offer(cards) {
    const early = this.#modelNames ? [] : DIALS.map((name) => [name, byId(name).value]).filter(([, value]) => value);
    this.models.offer(cards);
    if (this.#restored.models && cards.length) {
      const { models } = this.#restored;
      this.#restored = {};
      this.models.choose(models);
    }
    for (const [name, value] of early) this.#setDial(name, value);
    if (early.length) this.#save();
  }

  /** The bodies to post, one a model; null, the fields marked, if something in them cannot be right. */
  bodies() {
    this.clearErrors();
    const problems = this.#problems();
    for (const { field, message } of problems) this.showError(field, message);
    if (problems.length) {
      this.#focus(problems[0].field);
      return null;
    }
    const cards = this.models.chosen;
    const seed = this.#seed(cards.length > 1);
    return cards.map((card) => this.#body(card, seed, cards.length > 1));
  }

  /** Fills the form with what a generation was made with. */
  reuse({ model, params }) {
    this.models.choose([model]);
    for (const name of TEXTS) if (params[name] !== undefined) byId(name).value = params[name];
    byId("negative").open = params.negative_prompt !== "";
    this.size.set(params.width, params.height);
    this.#setDial("steps", params.steps);
    this.#setDial("guidance_scale", params.guidance_scale);
    this.#setCount(params.num_images);
    byId("deterministic").checked = params.deterministic;
    this.#setLock(true);
    this.clearErrors();
    this.#save();
    byId("prompt").focus();
  }

  write(prompt) {
    byId("prompt").value = prompt;
    byId("prompt").focus();
    this.#save();
  }

  /** Shows what a field is wrong about; where there is no such field, below the form. */
  showError(field, message) {
    const known = FIELDS.includes(field);
    const note = byId(known ? `${field}-error` : "request-error");
    note.textContent = message;
    note.hidden = false;
    if (!known) return;
    const input = byId(field);
    input.setAttribute("aria-invalid", "true");
    const fold = input.closest("details");
    if (fold) fold.open = true;
  }

  /** Shows a refusal of the server, and goes to its field. */
  showRefusal(refusal) {
    this.showError(refusal.field, refusal.message);
    if (refusal.field) this.#focus(refusal.field);
  }

  clearErrors() {
    for (const name of [...FIELDS, "request"]) byId(`${name}-error`).hidden = true;
    for (const node of this.form.querySelectorAll("[aria-invalid]")) node.removeAttribute("aria-invalid");
  }

  #focus(field) {
    if (FIELDS.includes(field)) byId(field).focus();
  }

  #problems() {
    const found = [];
    const cards = this.models.chosen;
    if (!byId("prompt").value.trim()) found.push({ field: "prompt", message: "Say what the picture shall show." });
    if (!cards.length) found.push({ field: "model", message: "Choose at least one model." });
    const size = this.size.problem();
    if (size) found.push(size);
    if (cards.length === 1) {
      const { max_steps, max_guidance_scale } = cards[0].limits;
      const steps = Number(byId("steps").value);
      const guidance = byId("guidance_scale").value;
      if (!Number.isInteger(steps) || steps < 1 || steps > max_steps) {
        found.push({ field: "steps", message: `A whole number from 1 to ${max_steps}, please.` });
      }
      if (guidance === "" || !(Number(guidance) >= 0 && Number(guidance) <= max_guidance_scale)) {
        found.push({ field: "guidance_scale", message: `A number from 0 to ${max_guidance_scale}, please.` });
      }
    }
    const seed = byId("seed").value.trim();
    if (seed && !(/^\d{1,16}$/.test(seed) && Number(seed) <= MAX_SEED)) {
      found.push({ field: "seed", message: `A whole number from 0 to ${MAX_SEED.toLocaleString("en")}, please.` });
    }
    return found;
  }

  /** The seed to send; undefined: the server's choice. Models that are compared get the same one. */
  #seed(comparing) {
    const kept = byId("seed").value.trim();
    if (this.lock.getAttribute("aria-pressed") === "true" && kept) return Number(kept);
    if (!comparing) return undefined;
    return crypto.getRandomValues(new Uint32Array(1))[0];
  }

  #body(card, seed, comparing) {
    const value = (name) => byId(name).value;
    const body = { model: card.name, prompt: value("prompt").trim() };
    const negative = value("negative_prompt").trim();
    if (negative && card.negative_prompt) body.negative_prompt = negative;
    Object.assign(body, { width: this.size.width, height: this.size.height });
    const { steps, guidance_scale } = card.defaults;
    body.steps = comparing ? steps : Number(value("steps"));
    body.guidance_scale = comparing ? guidance_scale : Number(value("guidance_scale"));
    if (seed !== undefined) body.seed = seed;
    const count = Math.min(this.#count(), card.limits.max_num_images);
    if (count > 1) body.num_images = count;
    if (value("sampler")) body.sampler = value("sampler");
    if (value("output_format") !== "png") body.output_format = value("output_format");
    if (byId("deterministic").checked) body.deterministic = true;
    return body;
  }

  #modelsChanged() {
    const cards = this.models.chosen;
    const names = cards.map((card) => card.name).join();
    const comparing = cards.length > 1;
    byId("own-note").hidden = !comparing;
    for (const name of DIALS) {
      for (const input of [byId(name), byId(`${name}-range`)]) input.disabled = comparing;
    }
    if (!cards.length) return;
    this.size.offer(cards);
    const { defaults, limits } = cards[0];
    byId("steps-range").max = Math.min(limits.max_steps, Math.max(50, defaults.steps));
    byId("guidance_scale-range").max = Math.min(limits.max_guidance_scale, 12);
    Object.assign(byId("steps"), { max: limits.max_steps });
    Object.assign(byId("guidance_scale"), { max: limits.max_guidance_scale });
    if (names !== this.#modelNames) {
      this.#setDial("steps", defaults.steps);
      this.#setDial("guidance_scale", defaults.guidance_scale);
    }
    this.#modelNames = names;
    this.#offerCounts(Math.max(...cards.map((card) => card.limits.max_num_images)));
    this.#noteNegative(cards.filter((card) => !card.negative_prompt));
    this.#save();
  }

  #noteNegative(without) {
    const note = byId("negative_prompt-note");
    note.hidden = !without.length;
    note.textContent = `No effect with ${without.map((card) => card.name).join(", ")}.`;
  }

  #offerCounts(most) {
    const box = byId("counts");
    if (box.children.length === most) return;
    const before = this.#count();
    box.replaceChildren(
      ...Array.from({ length: most }, (_, n) =>
        element(
          "label",
          {},
          element("input", { type: "radio", name: "count", value: n + 1, class: "unseen" }),
          element("span", {}, String(n + 1)),
        ),
      ),
    );
    this.#setCount(Math.min(before, most));
  }

  #count() {
    return Number(this.form.querySelector("input[name=count]:checked")?.value ?? this.#restored.count ?? 1);
  }

  #setCount(count) {
    const input = this.form.querySelector(`input[name=count][value="${count}"]`);
    if (input) input.checked = true;
  }

  #setLock(locked) {
    const label = locked ? "Take another seed each time" : "Keep this seed";
    this.lock.setAttribute("aria-pressed", String(locked));
    this.lock.setAttribute("aria-label", "Keep this seed");
    this.lock.title = label;
    this.lock.querySelector("use").setAttribute("href", locked ? "#icon-closed" : "#icon-open");
    this.#save();
  }

  /** Shows the seed that was drawn, so that it can be kept. */
  showSeed(seed) {
    if (this.lock.getAttribute("aria-pressed") === "true") return;
    byId("seed").value = String(seed);
  }

  /** A number and its slider say the same. */
  #couple(number, range) {
    number.addEventListener("input", () => (range.value = number.value));
    range.addEventListener("input", () => (number.value = range.value));
  }

  #setDial(name, value) {
    byId(name).value = value;
    byId(`${name}-range`).value = value;
  }

  #edited(input) {
    const field = { "steps-range": "steps", "guidance_scale-range": "guidance_scale" }[input.id] ?? (input.name || input.id);
    const name = field === "count" ? "num_images" : field;
    if (FIELDS.includes(name)) {
      byId(`${name}-error`).hidden = true;
      byId(name).removeAttribute("aria-invalid");
    }
    if (name === "height") byId("width-error").hidden = true;
    byId("request-error").hidden = true;
  }

  #save() {
    const kept = Object.fromEntries(TEXTS.map((name) => [name, byId(name).value]));
    kept.models = this.models.chosen.map((card) => card.name);
    if (!kept.models.length) return; // not yet offered any: what was kept still holds
    Object.assign(kept, { width: this.size.width, height: this.size.height, count: this.#count() });
    kept.locked = this.lock.getAttribute("aria-pressed") === "true";
    Object.assign(kept, { steps: byId("steps").value, guidance_scale: byId("guidance_scale").value });
    kept.deterministic = byId("deterministic").checked;
    keep("localStorage", NAME, JSON.stringify(kept));
  }

  #restore(kept) {
    for (const name of TEXTS) if (typeof kept[name] === "string") byId(name).value = kept[name];
    for (const name of DIALS) if (kept[name]) this.#setDial(name, kept[name]);
    byId("output_format").value ||= "png";
    byId("negative").open = Boolean(kept.negative_prompt);
    if (kept.width && kept.height) {
      byId("width").value = kept.width;
      byId("height").value = kept.height;
    }
    byId("deterministic").checked = Boolean(kept.deterministic);
    this.#setLock(Boolean(kept.locked));
  }
}
