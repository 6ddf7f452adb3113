/** A picture as large as the window, and its neighbours of the same generation. */

import { byId } from "./element.js";

export class Viewer {
  #generation = null;
  #n = 0;

  constructor(server) {
    this.server = server;
    this.dialog = byId("picture-dialog");
    byId("viewer-close").addEventListener("click", () => this.dialog.close());
    byId("viewer-previous").addEventListener("click", () => this.#step(-1));
    byId("viewer-next").addEventListener("click", () => this.#step(1));
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("keydown", ({ key }) => {
      if (key === "ArrowLeft") this.#step(-1);
      if (key === "ArrowRight") this.#step(1);
    });
  }

  open(generation, n) {
    this.#generation = generation;
    const several = generation.images.length > 1;
    byId("viewer-previous").hidden = byId("viewer-next").hidden = !several;
    this.#show(n);
    this.dialog.showModal();
    byId("viewer-close").focus();
  }

  #step(by) {
    const count = this.#generation.images.length;
    this.#show((this.#n + by + count) % count);
  }

  #show(n) {
    this.#n = n;
    const { id, model, params, images } = this.#generation;
    const { url, seed, width, height, format } = images[n];
    const image = byId("viewer-image");
    const src = this.server.pictureUrl(url);
    Object.assign(image, { src, alt: params.prompt, width, height });
    byId("viewer-text").textContent = `${model} · ${width} × ${height} · seed ${seed}`;
    Object.assign(byId("viewer-download"), { href: src, download: `${id}-${n}.${format}` });
  }
}
