/** Follows a generation from wherever it is until it has ended. */

import { Refusal } from "./server.js";

const ENDED = new Set(["succeeded", "failed", "canceled"]);
const LOOK_MS = 2_500;
const PATIENCE_MS = 30_000; // a stream without even a heartbeat is dead
const MOST_STREAMS = 3; // a browser opens six connections to a server, over all tabs

/** Whether nothing about it changes any more, but that its pictures expire. */
export function hasEnded(generation) {
  return ENDED.has(generation.status);
}

export class Follower {
  #streams = 0;

  constructor(server) {
    this.server = server;
  }

  /**
   * Calls `onChange` with the generation at each change, `onPreview` with a data: url. Returns once it has ended.
   * Where no stream can be had or `streams` is off, or one breaks, it looks every now and then. Refusal: this caller
   * may not see it.
   */
  async follow(id, { onChange, onPreview, signal, streams = true }) {
    const followed = { id, onChange, onPreview, signal, generation: null, lastId: "" };
    while (!signal.aborted) {
      let wait = LOOK_MS;
      try {
        change(followed, await this.server.generation(id));
        const open = !hasEnded(followed.generation);
        if (open && streams && this.#streams < MOST_STREAMS) await this.#stream(followed);
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof Refusal && [401, 403, 404].includes(error.status)) throw error;
        wait = Math.max(wait, (error.retryAfter ?? 0) * 1_000);
      }
      if (followed.generation && hasEnded(followed.generation)) return;
      await pause(wait, signal);
    }
  }

  async #stream(followed) {
    const own = new AbortController();
    const stop = () => own.abort();
    followed.signal.addEventListener("abort", stop);
    let patience = setTimeout(stop, PATIENCE_MS);
    const alive = () => {
      clearTimeout(patience);
      patience = setTimeout(stop, PATIENCE_MS);
    };
    this.#streams += 1;
    try {
      for await (const event of this.server.events(followed.id, followed.lastId, own.signal, alive)) {
        take(event, followed);
        if (hasEnded(followed.generation)) return;
      }
    } finally {
      this.#streams -= 1;
      clearTimeout(patience);
      followed.signal.removeEventListener("abort", stop);
      own.abort();
    }
  }
}

function take({ id, name, data }, followed) {
  if (id) followed.lastId = id;
  if (name === "preview") followed.onPreview(`data:${data.media_type};base64,${data.image}`);
  else if (name === "queued") change(followed, { ...followed.generation, ...data, status: "queued", progress: null });
  else if (name === "running") change(followed, { ...followed.generation, status: "running", queue_position: null });
  else if (name === "progress") change(followed, { ...followed.generation, status: "running", progress: data });
  else if (ENDED.has(name)) change(followed, data);
}

function change(followed, generation) {
  followed.generation = generation;
  followed.onChange(generation);
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(done, milliseconds);
    function done() {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    }
    signal.addEventListener("abort", done);
  });
}
