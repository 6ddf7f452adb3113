/**
 * The browser's storage, which may be off, full or emptied at any time: what it cannot keep lasts as long as the page.
 * It is given by name, "localStorage" or "sessionStorage": where a browser blocks it, already a look at it throws.
 */

const held = { localStorage: new Map(), sessionStorage: new Map() };

/** The text kept under a name, or null. */
export function recall(storage, name) {
  try {
    return window[storage].getItem(name) ?? held[storage].get(name) ?? null;
  } catch {
    return held[storage].get(name) ?? null;
  }
}

/** Keeps a text under a name. Whether the storage took it. */
export function keep(storage, name, text) {
  try {
    window[storage].setItem(name, text);
    held[storage].delete(name);
    return true;
  } catch {
    held[storage].set(name, text);
    return false;
  }
}

/** Forgets what is kept under a name. */
export function drop(storage, name) {
  held[storage].delete(name);
  try {
    window[storage].removeItem(name);
  } catch {
    // nothing is kept there then
  }
}

/** All names that begin so. */
export function names(storage, prefix) {
  const found = new Set([...held[storage].keys()].filter((name) => name.startsWith(prefix)));
  try {
    const kept = window[storage];
    for (let n = 0; n < kept.length; n++) {
      if (kept.key(n).startsWith(prefix)) found.add(kept.key(n));
    }
  } catch {
    // nothing is kept there then
  }
  return [...found];
}

/** The value of a kept JSON text; `otherwise` where there is none or it is broken. */
export function recallJson(storage, name, otherwise) {
  try {
    return JSON.parse(recall(storage, name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}
