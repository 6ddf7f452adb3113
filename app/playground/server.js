/** Darkroom's native API, as seen from its own page. */

import { readEvents } from "./events.js";

/** What the server refused: its code, its sentence, the field at fault; status 0 where no answer came. */
export class Refusal extends Error {
  constructor(status, { code = "", message = "", field = null, request_id = "" } = {}, retryAfter = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.field = field;
    this.requestId = request_id;
    this.retryAfter = retryAfter;
  }
}

const GONE = { code: "unreachable", message: "The server does not answer. Is it running?" };
const ANSWER_MS = 30_000;

export class Server {
  /** keys: the key to send; asked for another where the server answers 401. */
  constructor(keys) {
    this.base = new URL(".", document.baseURI);
    this.keys = keys;
  }

  /** The model cards, by name. */
  async models() {
    return (await this.#json("GET", "v1/models")).models;
  }

  /** Asks for pictures; once more if no answer came, with the same key, so that nothing is made twice. */
  async create(body) {
    const headers = { "idempotency-key": chance() };
    try {
      return await this.#json("POST", "v1/generations", body, headers);
    } catch (error) {
      if (error.status !== 0) throw error;
      return this.#json("POST", "v1/generations", body, headers);
    }
  }

  /** The caller's own generations, newest first: {generations, next}; `next` is the cursor of the next page. */
  async page(cursor) {
    return this.#json("GET", `v1/generations?limit=40${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
  }

  async generation(id) {
    return this.#json("GET", `v1/generations/${id}`);
  }

  async cancel(id) {
    return this.#json("POST", `v1/generations/${id}/cancel`);
  }

  /** Forgets a generation: its words and its pictures. */
  async forget(id) {
    await this.#answer("DELETE", `v1/generations/${id}`);
  }

  /** Events of a generation, those after `lastId` first, then as they come: {id, name, data}. Beats call `alive` too. */
  async *events(id, lastId, signal, alive) {
    const headers = { accept: "text/event-stream", ...(lastId && { "last-event-id": lastId }) };
    const answer = await this.#answer("GET", `v1/generations/${id}/events?previews=true`, { headers, signal });
    if (answer.body) yield* readEvents(answer.body, alive);
  }

  /** Where a picture of an answer lies as this page sees the server, which may be at another address than it thinks. */
  pictureUrl(url) {
    const { pathname, search } = new URL(url, this.base);
    const path = pathname.slice(pathname.lastIndexOf("/v1/") + 1);
    return new URL(path + search, this.base).href;
  }

  async #json(method, path, body, headers = {}) {
    const content = body && { body: JSON.stringify(body), headers: { "content-type": "application/json", ...headers } };
    const answer = await this.#answer(method, path, { ...content, signal: AbortSignal.timeout(ANSWER_MS) });
    try {
      return await answer.json();
    } catch {
      throw new Refusal(0, GONE); // cut off on its way, or a proxy's page
    }
  }

  /** The answer to a request; a Refusal is thrown. A 401 asks for a key, then tries again with it. */
  async #answer(method, path, { body, headers = {}, signal } = {}) {
    for (;;) {
      const key = this.keys.key;
      const allHeaders = key ? { ...headers, authorization: `Bearer ${key}` } : headers;
      const answer = await this.#fetch(path, { method, body, headers: allHeaders, signal });
      if (answer.ok) {
        this.keys.taken(key);
        return answer;
      }
      const refusal = await refusalOf(answer);
      if (answer.status !== 401 || !(await this.keys.ask(key, refusal.message))) throw refusal;
    }
  }

  async #fetch(path, options) {
    try {
      return await fetch(new URL(path, this.base), { ...options, cache: "no-store", credentials: "same-origin" });
    } catch (error) {
      if (options.signal?.aborted && error.name === "AbortError") throw error;
      throw new Refusal(0, GONE);
    }
  }
}

/** Text that nobody else has; `crypto.randomUUID` is there only on https. */
function chance() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function refusalOf(answer) {
  const wait = Number(answer.headers.get("retry-after")) || null;
  try {
    return new Refusal(answer.status, (await answer.json()).error, wait);
  } catch {
    // not ours: a proxy's page
    return new Refusal(answer.status, { code: "http_error", message: `The server answered ${answer.status}.` }, wait);
  }
}
