/** The dialog that shows a request as code. */

import { byId, element } from "./element.js";
import { snippets } from "./snippets.js";

export class CodeDialog {
  #snippets = [];
  #shown = 0;

  /** keys: whether code needs one; announce: tells a screen reader. */
  constructor(server, announce) {
    this.server = server;
    this.announce = announce;
    this.dialog = byId("code-dialog");
    this.tabs = byId("code-tabs");
    this.tabs.addEventListener("keydown", (event) => this.#arrow(event));
    byId("code-close").addEventListener("click", () => this.dialog.close());
    byId("code-copy").addEventListener("click", () => this.#copy());
  }

  open(body) {
    this.#snippets = snippets(body, this.server.base.href, Boolean(this.server.keys.key));
    this.tabs.replaceChildren(...this.#snippets.map(([name], n) => this.#tab(name, n)));
    this.#show(this.#shown);
    this.dialog.showModal();
    this.tabs.children[this.#shown].focus();
  }

  #tab(name, n) {
    const attributes = { type: "button", role: "tab", id: `code-tab-${n}`, "aria-controls": "code-panel" };
    return element("button", { ...attributes, onclick: () => this.#show(n) }, name);
  }

  #show(n) {
    this.#shown = n;
    [...this.tabs.children].forEach((tab, at) => {
      tab.setAttribute("aria-selected", String(at === n));
      tab.tabIndex = at === n ? 0 : -1;
    });
    byId("code-panel").setAttribute("aria-labelledby", `code-tab-${n}`);
    byId("code-text").textContent = this.#snippets[n][1];
    byId("code-panel").scrollTop = 0;
    byId("code-copy").textContent = "Copy";
  }

  #arrow(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const count = this.#snippets.length;
    this.#show((this.#shown + by + count) % count);
    this.tabs.children[this.#shown].focus();
  }

  async #copy() {
    const done = await copyText(this.#snippets[this.#shown][1], byId("code-text"));
    byId("code-copy").textContent = done ? "Copied" : "Press Ctrl+C";
    this.announce(done ? "Copied" : "The code is selected; press Control C");
  }
}

/** Copies a text that `node` shows; where the browser keeps the clipboard to https, selects it at least. */
async function copyText(text, node) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(node);
    return document.execCommand("copy");
  }
}
