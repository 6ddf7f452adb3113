/** The browser's storage, which may be off, full or emptied at any time: what it cannot keep lasts as long as the page. */

const held = new Map();

/** The text kept under a name, or null. */
export function recall(storage, name) {
  try {
    return storage.getItem(name) ?? held.get(name) ?? null;
  } catch {
    return held.get(name) ?? null;
  }
}

/** Keeps a text under a name. Whether the storage took it. */
export function keep(storage, name, text) {
  try {
    storage.setItem(name, text);
    held.delete(name);
    return true;
  } catch {
    held.set(name, text);
    return false;
  }
}

/** Forgets what is kept under a name. */
export function drop(storage, name) {
  held.delete(name);
  try {
    storage.removeItem(name);
  } catch {
    // nothing is kept there then
  }
}

/** All names that begin so. */
export function names(storage, prefix) {
  const found = new Set([...held.keys()].filter((name) => name.startsWith(prefix)));
  try {
    for (let n = 0; n < storage.length; n++) {
      if (storage.key(n).startsWith(prefix)) found.add(storage.key(n));
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
