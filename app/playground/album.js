/** The generations that this browser asked for, newest first; they survive a reload, and all tabs see the same. */

import { hasEnded } from "./follower.js";
import { drop, keep, names, recallJson } from "./storage.js";

const PREFIX = "darkroom.generation.";
const MOST = 200;

/** Says `change` with detail {id} when one changed, came or went; `arrive` too when another tab put it here. */
export class Album extends EventTarget {
  #records = new Map();

  constructor() {
    super();
    for (const name of names("localStorage", PREFIX)) {
      const record = recallJson("localStorage", name, null);
      if (record?.generation?.id) this.#records.set(record.generation.id, record);
      else drop("localStorage", name); // nothing else would
    }
    addEventListener("storage", (event) => this.#changedElsewhere(event));
  }

  /** Ids, newest first: they begin with their time. */
  get ids() {
    return [...this.#records.keys()].sort().reverse();
  }

  /** {generation, gone} of an id; `gone`: the server does not know it any more. */
  record(id) {
    return this.#records.get(id);
  }

  get unfinished() {
    return this.ids.filter((id) => this.isOpen(id));
  }

  /** Whether one more would push the oldest out. */
  get isFull() {
    return this.#records.size >= MOST;
  }

  isOpen(id) {
    const { generation, gone } = this.#records.get(id) ?? { gone: true };
    return !gone && !hasEnded(generation);
  }

  put(generation) {
    const { id } = generation;
    const before = this.#records.get(id)?.generation;
    this.#records.set(id, { generation, gone: false });
    // Steps are not kept: they are asked for again
    if (!before || before.status !== generation.status || hasEnded(generation)) this.#keep(id);
    this.#tell(id);
  }

  /** The server does not know it any more. */
  lose(id) {
    const record = this.#records.get(id);
    if (!record || record.gone) return;
    this.#records.set(id, { ...record, gone: true });
    this.#keep(id);
    this.#tell(id);
  }

  remove(id) {
    this.#records.delete(id);
    drop("localStorage", PREFIX + id);
    this.#tell(id);
  }

  clear() {
    for (const id of this.ids) this.remove(id);
  }

  #keep(id) {
    for (const old of this.ids.slice(MOST)) this.remove(old);
    if (!this.#records.has(id)) return; // it was itself the oldest
    const text = JSON.stringify(this.#records.get(id));
    if (keep("localStorage", PREFIX + id, text)) return;
    const oldest = this.ids.slice(-Math.ceil(this.#records.size / 4));
    for (const old of oldest) if (old !== id && !this.isOpen(old)) this.remove(old);
    keep("localStorage", PREFIX + id, text);
  }

  #changedElsewhere({ key, newValue }) {
    if (!key?.startsWith(PREFIX)) return;
    const id = key.slice(PREFIX.length);
    if (newValue === null) {
      this.#records.delete(id);
      this.#tell(id);
      return;
    }
    const record = recallJson("localStorage", key, null);
    if (record?.generation?.id !== id) return;
    this.#records.set(id, record);
    this.#tell(id);
    this.#tell(id, "arrive");
  }

  #tell(id, name = "change") {
    this.dispatchEvent(new CustomEvent(name, { detail: { id } }));
  }
}

/** When the pictures of a generation go, or went: a Date; null if it is not known. */
export function expiry({ expires_at: at }) {
  return at ? new Date(at) : null;
}

/** Whether its pictures are gone by the clock. */
export function hasExpired(generation) {
  const at = expiry(generation);
  return at !== null && at <= new Date();
}
