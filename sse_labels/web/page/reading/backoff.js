// @ts-check
/**
 * When the server may be asked again.
 *
 * Promises: all connections of a hub take their turn here, so a browser asks no more often than
 * this allows, however many tabs there are. A wait ends by itself; a person or the browser's
 * `online` event ends it early, and never sooner than a stated time after the last try. Nothing
 * else does: whoever wakes is sent back to wait when it is too early.
 * Does not belong here: why a try failed, in words (`connection.js`).
 */

/** How long until the next try, when the server does not say; doubled each time … */
export const RETRY_MS = 2000;
/** … up to here. */
export const RETRY_MAX_MS = 30_000;
/** After a failure no try follows the last one sooner, whatever a server or a person wants. */
export const RETRY_MIN_MS = 500;
/** No hint of a server (`retry:`, `Retry-After`) is followed longer than this, jitter apart. */
export const HINT_MAX_MS = 3_600_000;
/** The random part of each wait, as a share of it. */
export const JITTER = 0.5;

export class Backoff {
  /** When the next try is due, as `Date.now()`; undefined: at once. @type {number | undefined} */
  retryAt;

  #baseMs = RETRY_MS;
  #failures = 0;
  /** No try begins before, as `performance.now()`. */
  #notBefore = -Infinity;
  #lastTry = -Infinity;
  /** Whether the server answered the last try: then `online` is no news. */
  #answered = false;
  /** Whose try after a failure it is; the others wait for what comes of it.
   * @type {AbortSignal | null} */
  #trying = null;
  /** Let all look again whether it is their turn. @type {Set<() => void>} */ #waiting = new Set();

  /** Take what the server says by `retry:`. @param {number} ms */
  hint(ms) {
    this.#baseMs = Math.min(ms, HINT_MAX_MS);
  }

  /**
   * Wait until a try may begin, or the signal ends the wait.
   * @param {AbortSignal} signal  of the connection; names it in what follows
   * @returns {Promise<boolean>}  whether it may begin
   */
  async turn(signal) {
    const look = () => this.#look();
    const online = () => this.#online();
    addEventListener("online", online);
    signal.addEventListener("abort", look);
    // Whoever woke it: it is the clock that says whether it is time.
    while (!signal.aborted && (this.#trying || this.#left() > 0)) await this.#change();
    signal.removeEventListener("abort", look);
    removeEventListener("online", online);
    if (signal.aborted) return false;
    this.#lastTry = performance.now();
    if (this.#failures > 0) this.#trying = signal;
    return true;
  }

  /**
   * The try led to a stream, or was given up. Others follow a moment later: some servers close
   * what they have opened at once, and that is a failure.
   * @param {AbortSignal} signal
   */
  settled(signal) {
    if (this.#trying === signal) this.#end(signal, RETRY_MIN_MS);
  }

  /** The stream brought what was asked for: what fails from here on is a new trouble. */
  delivered() {
    this.#failures = 0;
  }

  /**
   * The try failed, or its stream ended.
   * @param {AbortSignal} signal
   * @param {{askedMs?: number, answered: boolean, final: boolean}} failure  `askedMs`: how long the
   *   server asks to wait; `final`: nobody tries again by itself, so only loops are to be slowed
   */
  failed(signal, { askedMs = 0, answered, final }) {
    const base = final ? RETRY_MIN_MS : Math.max(RETRY_MIN_MS, this.#baseMs);
    const grown = Math.max(base, Math.min(RETRY_MAX_MS, base * 2 ** this.#failures));
    this.#failures += 1;
    this.#answered = answered;
    // Never less than asked for, and never all at once: a server that comes back has many readers.
    const wait = Math.max(grown, Math.min(askedMs, HINT_MAX_MS)) * (1 + JITTER * Math.random());
    this.retryAt = Math.round(Date.now() + wait);
    this.#end(signal, wait);
  }

  /** A person does not want to wait. */
  cut() {
    this.#dueBy(RETRY_MIN_MS);
  }

  #online() {
    if (!this.#answered) this.#dueBy(RETRY_MS);
  }

  /** @param {number} ms  after the last try */
  #dueBy(ms) {
    const due = Math.max(this.#lastTry + ms, performance.now());
    if (due >= this.#notBefore) return;
    this.#notBefore = due;
    this.retryAt = Math.round(Date.now() + this.#left());
    this.#look();
  }

  /** @param {AbortSignal} signal @param {number} ms */
  #end(signal, ms) {
    if (this.#trying === signal) this.#trying = null;
    this.#notBefore = Math.max(this.#notBefore, performance.now() + ms);
    this.#look();
  }

  #left() {
    return this.#notBefore - performance.now();
  }

  #look() {
    for (const look of [...this.#waiting]) look();
  }

  /** Until time has passed, or something has changed. */
  async #change() {
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    await new Promise((resolve) => {
      const look = () => resolve(this.#waiting.delete(look));
      this.#waiting.add(look);
      // At most `HINT_MAX_MS` and its jitter: browsers fire beyond 2^31 - 1 ms at once.
      if (!this.#trying) timer = setTimeout(look, Math.ceil(this.#left()));
    });
    clearTimeout(timer);
  }
}
