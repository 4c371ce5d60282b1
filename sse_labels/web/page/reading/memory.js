// @ts-check
/**
 * Keeps the cursor of a page in the browser's storage.
 */

/** How often the cursor is written. */
const REMEMBER_MS = 1000;

/** A cursor in the browser's storage. Within one epoch it only grows. */
export class Memory {
  /** @type {{epoch: string, seq: number} | null} */ #kept = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #timer;

  /** @param {string} key */
  constructor(key) {
    this.key = key;
  }

  /** @returns {{epoch: string, seq: number} | null} */
  read() {
    try {
      const { epoch, seq } = JSON.parse(localStorage.getItem(this.key) ?? "");
      return typeof epoch === "string" && isSeq(seq) ? { epoch, seq } : null;
    } catch {
      // The storage has no cursor, has another value, or is not allowed.
      return null;
    }
  }

  /** @param {string} epoch @param {number} seq */
  keep(epoch, seq) {
    this.#kept = { epoch, seq };
    this.#timer ??= setTimeout(() => this.write(), REMEMBER_MS);
  }

  write() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    const kept = this.#kept;
    this.#kept = null;
    if (!kept) return;
    const there = this.read();
    // Another tab has a higher cursor.
    if (there && there.epoch === kept.epoch && there.seq >= kept.seq) return;
    try {
      localStorage.setItem(this.key, JSON.stringify(kept));
    } catch {
      // The storage is full or not allowed. The next time the stream starts from now, and says so.
    }
  }

  forget() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#kept = null;
    try {
      localStorage.removeItem(this.key);
    } catch {
      // The storage is not allowed, so it has no cursor.
    }
  }
}

/** @param {unknown} value @returns {value is number} */
export function isSeq(value) {
  return Number.isSafeInteger(value) && Number(value) >= 0;
}

/** The seq in an event id. @param {string} id @throws {Error} */
export function seqOf(id) {
  const seq = Number(id);
  if (!/^\d+$/.test(id) || !isSeq(seq)) throw new Error(`its event id is ${JSON.stringify(id)}`);
  return seq;
}
