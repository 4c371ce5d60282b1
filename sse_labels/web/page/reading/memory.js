// @ts-check
/**
 * Where a page left off, kept in the browser's storage.
 */

/** At most so often it is written. */
const REMEMBER_MS = 1000;

/** A cursor in the browser's storage: it grows only, as long as its epoch lasts. */
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
      // Nothing there, something else there, or no storage allowed.
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
    // Another tab is further.
    if (there && there.epoch === kept.epoch && there.seq >= kept.seq) return;
    try {
      localStorage.setItem(this.key, JSON.stringify(kept));
    } catch {
      // Full, or not allowed: it starts from now the next time, and says so.
    }
  }

  forget() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#kept = null;
    try {
      localStorage.removeItem(this.key);
    } catch {
      // Not allowed: then nothing is there.
    }
  }
}

/** @param {unknown} value @returns {value is number} */
export function isSeq(value) {
  return Number.isSafeInteger(value) && Number(value) >= 0;
}
