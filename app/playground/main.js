/** The playground: what its parts tell each other. */

import { Album } from "./album.js";
import { CodeDialog } from "./code.js";
import { byId, element } from "./element.js";
import { Follower } from "./follower.js";
import { Keys } from "./keys.js";
import { RequestForm } from "./requestform.js";
import { Refusal, Server } from "./server.js";
import { Sheet } from "./sheet.js";
import { Stage } from "./stage.js";
import { Viewer } from "./viewer.js";

const MODELS_EVERY_MS = 10_000;
const STARTERS = [
  "a red circle to the left of a blue square, on a white background",
  "a yellow moon above a purple cloud, night sky",
  "three orange flowers on a meadow",
];

const keys = new Keys();
const server = new Server(keys);
const follower = new Follower(server);
const album = new Album();
const request = new RequestForm();
const viewer = new Viewer(server);
const code = new CodeDialog(server, announce);
const followed = new Map();

const actions = {
  pictureUrl: (url) => server.pictureUrl(url),
  view: (id, n) => viewer.open(album.record(id).generation, n),
  reuse: (id) => request.reuse(album.record(id).generation),
  code: (id) => code.open(bodyOf(album.record(id).generation)),
  cancel: (id) => tried(async () => album.put(await server.cancel(id))),
  forget,
  refresh,
  lost: refresh,
};
const stage = new Stage(album, actions);
const sheet = new Sheet(album, actions);

function announce(text) {
  byId("announcer").textContent = text;
}

/** Does what the server may refuse; the refusal is shown at the form. */
async function tried(work) {
  keys.reconsider();
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    request.showRefusal(error);
  }
}

/** What to post, with a last look for models if none is known yet; null if something in the form cannot be right. */
async function bodiesOfForm() {
  if (!request.models.chosen.length) await lookForModels();
  return request.bodies();
}

async function develop() {
  const button = byId("develop");
  if (button.disabled) return; // keys send the form although its button is off
  button.disabled = true;
  try {
    keys.reconsider();
    const bodies = await bodiesOfForm();
    if (bodies) await tried(() => createAll(bodies));
  } finally {
    button.disabled = false;
  }
}

async function createAll(bodies) {
  const accepted = [];
  try {
    // One after the other: they start in this order, and a refusal is of the first that is refused
    for (const body of bodies) accepted.push(await server.create(body));
  } finally {
    accepted.forEach((generation) => album.put(generation));
    if (accepted.length) {
      stage.show(accepted.map(({ id }) => ({ id, only: null })));
      request.showSeed(accepted[0].params.seed);
      accepted.forEach(({ id }) => follow(id));
    }
  }
  announce(bodies.length > 1 ? `Asked ${bodies.length} models` : "Asked for");
  stage.reveal();
}

/** streams: whether to listen rather than to look every now and then. */
async function follow(id, { streams = true } = {}) {
  if (followed.has(id)) return;
  const stop = new AbortController();
  followed.set(id, stop);
  const onChange = (generation) => {
    if (stop.signal.aborted) return; // an answer that was on its way
    tell(album.record(id)?.generation, generation);
    album.put(generation);
  };
  const onPreview = (url) => stage.preview(id, url);
  try {
    await follower.follow(id, { onChange, onPreview, signal: stop.signal, streams });
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 404) album.lose(id);
    else request.showRefusal(error);
  } finally {
    if (followed.get(id) === stop) followed.delete(id);
  }
}

function unfollow(id) {
  followed.get(id)?.abort();
  followed.delete(id);
}

/** Says aloud what happened, not each step. */
function tell(before, { status, images, error, model }) {
  if (before?.status === status) return;
  const texts = {
    running: `${model}: developing`,
    succeeded: `${model}: ${images.length === 1 ? "the picture is" : `${images.length} pictures are`} ready`,
    failed: `${model}: failed. ${error?.message ?? ""}`,
    canceled: `${model}: canceled`,
  };
  if (texts[status]) announce(texts[status]);
}

/** Looks again at a generation whose pictures do not show. */
async function refresh(id) {
  try {
    album.put(await server.generation(id));
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 404) album.lose(id);
  }
}

async function forget(id) {
  await tried(async () => {
    try {
      await server.forget(id);
    } catch (error) {
      if (error.status !== 404) throw error; // gone already
    }
    album.remove(id);
    announce("Deleted");
    stage.node.focus({ preventScroll: true });
  });
}

/** The request that makes a generation again. */
function bodyOf({ model, params }) {
  const { prompt, negative_prompt, width, height, steps, guidance_scale, seed } = params;
  const { num_images, sampler, output_format, deterministic } = params;
  const own = request.models.card(model)?.defaults.sampler;
  return {
    model,
    prompt,
    ...(negative_prompt && { negative_prompt }),
    ...{ width, height, steps, guidance_scale, seed },
    ...(num_images > 1 && { num_images }),
    ...(sampler !== own && { sampler }),
    ...(output_format !== "png" && { output_format }),
    ...(deterministic && { deterministic }),
  };
}

async function lookForModels() {
  const state = byId("server-state");
  const say = (text) => state.textContent === text || (state.textContent = text); // said aloud once, not each time
  try {
    const cards = await server.models();
    request.offer(cards);
    const loaded = cards.filter((card) => card.loaded).length;
    state.dataset.state = loaded ? "ready" : "waiting";
    say(readiness(cards.length, loaded));
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    state.dataset.state = "away";
    say(error.status === 401 ? "Needs a key" : error.message);
  }
}

function readiness(known, loaded) {
  if (!known) return "No model yet: no worker has started";
  if (!loaded) return "No worker: pictures wait for one";
  return loaded < known ? `${loaded} of ${known} models loaded` : "Ready";
}

let olderCursor = null;
let hasOlder = true;

/** Puts the next page of the caller's generations into the album. */
async function older() {
  await tried(async () => {
    const { generations, next } = await server.page(olderCursor);
    generations.forEach((generation) => album.put(generation));
    olderCursor = next;
    hasOlder = next !== null;
    offerOlder();
    stage.showSomething();
    generations.filter(({ id }) => album.isOpen(id)).forEach(({ id }) => follow(id));
    announce(`${generations.length} more`);
  });
}

/** A full album would let go of what older ones it is given. */
function offerOlder() {
  byId("older").hidden = !hasOlder || album.isFull;
}

request.addEventListener("develop", develop);
sheet.addEventListener("open", ({ detail }) => {
  stage.show(detail);
  stage.reveal();
});
byId("request-code").addEventListener("click", async () => {
  const bodies = await bodiesOfForm();
  if (bodies) code.open(bodies[0]);
});
byId("older").addEventListener("click", older);
for (const prompt of STARTERS) {
  const onclick = () => request.write(prompt);
  byId("starters").append(element("li", {}, element("button", { type: "button", class: "starter", onclick }, prompt)));
}
album.addEventListener("change", ({ detail: { id } }) => {
  if (!album.record(id)) unfollow(id);
  offerOlder();
});
album.addEventListener("arrive", ({ detail: { id } }) => {
  // Without a stream: the tab that asked has one, and a browser opens few connections to a server, over all tabs
  if (album.isOpen(id)) follow(id, { streams: false });
});
addEventListener("darkroom:key", ({ detail: { isAnothers } }) => {
  if (isAnothers) album.clear(); // what a key showed goes with it, for the urls of pictures need no key
  olderCursor = null; // it was a place in the list of the key before
  hasOlder = true;
  offerOlder();
  lookForModels();
});
document.addEventListener("visibilitychange", () => document.hidden || lookForModels());
setInterval(() => document.hidden || lookForModels(), MODELS_EVERY_MS);
stage.showSomething();
offerOlder();
await lookForModels();
for (const id of album.unfinished) follow(id);
