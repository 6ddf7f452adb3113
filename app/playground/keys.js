/** The API key: kept until the tab is closed, or in this browser if asked; and the dialog that asks for it. */

import { byId } from "./element.js";
import { recall, keep, drop } from "./storage.js";

const NAME = "darkroom.key";

export class Keys {
  #asking = null;
  #declined = false;
  #needed = false;
  #owner;

  constructor() {
    this.key = recall("sessionStorage", NAME) ?? recall("localStorage", NAME) ?? "";
    this.#owner = this.key;
    this.dialog = byId("key-dialog");
    this.text = byId("key-text");
    byId("key").addEventListener("click", () => this.#open("What you ask for is sent with this key."));
    byId("key-cancel").addEventListener("click", () => this.dialog.close("no"));
    byId("key-forget").addEventListener("click", () => this.dialog.close("forget"));
    byId("key-form").addEventListener("submit", (event) => this.#submit(event));
    this.#show();
  }

  /** After the user asked for something: a key may be asked for again. */
  reconsider() {
    this.#declined = false;
  }

  /** After the server took a key: what is shown is its holder's. */
  taken(key) {
    if (key === this.key) this.#owner = key; // else it was changed since
  }

  /** Asks for another key than `used`, which was refused for `reason`. Whether there is one now. */
  async ask(used, reason) {
    this.#needed = true;
    this.#show();
    if (this.key !== used) return true; // given meanwhile
    if (this.#declined) return false;
    await this.#open(used ? reason : "It was started with API keys on.");
    this.#declined = this.key === used;
    return !this.#declined;
  }

  /** Opens the dialog, once; returns when it is closed. */
  #open(reason) {
    this.#asking ??= new Promise((resolve) => {
      byId("key-reason").textContent = reason;
      byId("key-forget").hidden = !this.key;
      byId("key-remember").checked = recall("localStorage", NAME) !== null;
      this.text.value = "";
      this.dialog.returnValue = "";
      this.dialog.addEventListener("close", resolve, { once: true });
      this.dialog.showModal();
      this.text.focus();
    }).then(() => {
      this.#asking = null;
      if (this.dialog.returnValue === "yes") this.#use(this.text.value.trim(), byId("key-remember").checked);
      if (this.dialog.returnValue === "forget") this.#use("", false);
      this.text.value = "";
    });
    return this.#asking;
  }

  #submit(event) {
    event.preventDefault();
    if (this.text.value.trim()) this.dialog.close("yes");
    else this.text.focus();
  }

  /** Says `darkroom:key` with detail {isAnothers}: whether what is shown is another key's, or a forgotten one's. */
  #use(key, remember) {
    // A key that was mistyped owned nothing: what the right one shows stays
    const isAnothers = !key || (this.#owner !== "" && this.#owner !== key);
    if (isAnothers) this.#owner = "";
    this.key = key;
    for (const storage of ["sessionStorage", "localStorage"]) drop(storage, NAME);
    if (key) keep(remember ? "localStorage" : "sessionStorage", NAME, key);
    this.#declined = false;
    this.#show();
    dispatchEvent(new CustomEvent("darkroom:key", { detail: { isAnothers } }));
  }

  #show() {
    byId("key").hidden = !this.key && !this.#needed;
  }
}
