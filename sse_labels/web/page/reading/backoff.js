// @ts-check
/**
 * Decides when the server may be asked again.
 *
 * Promises: all connections of a hub wait here, so the number of tabs does not change how often a
 * browser asks. A wait ends by itself. A person, or the browser's `online` event, can end a wait
 * early, but only after a minimum time since the last try. Nothing else ends a wait early.
 * Does not belong here: the message about a failed try (`end.js`).
 */

/** The wait until the next try, when the server does not ask for another. It doubles each time. */
export const RETRY_MS = 2000;
/** The longest wait without a hint of the server. */
export const RETRY_MAX_MS = 30_000;
/** The shortest time between two tries after a failure, even if a server or a person wants less. */
export const RETRY_MIN_MS = 500;
/** The longest wait that a server's hint (`retry:`, `Retry-After`) can cause, without jitter. */
export const HINT_MAX_MS = 3_600_000;
/** The random part of each wait, as a share of the wait. */
export const JITTER = 0.5;

export class Backoff {
  /** The time of the next try, as `Date.now()`. undefined: at once. @type {number | undefined} */
  retryAt;

  #baseMs = RETRY_MS;
  #failures = 0;
  /** No try begins before this time, as `performance.now()`. */
  #notBefore = -Infinity;
  #lastTry = -Infinity;
  /** Whether the server answered the last try. Then an `online` event changes nothing. */
  #answered = false;
  /** The connection that tries after a failure. The others wait for its outcome.
   * @type {AbortSignal | null} */
  #trying = null;
  /** Wakes each waiting connection. @type {Set<() => void>} */ #waiting = new Set();

  /** Take the wait of the server's `retry:`. @param {number} ms */
  hint(ms) {
    this.#baseMs = Math.min(ms, HINT_MAX_MS);
  }

  /**
   * Wait until a try may begin, or the signal ends the wait.
   * @param {AbortSignal} signal  of the connection; it identifies the connection in later calls
   * @returns {Promise<boolean>}  whether the try may begin
   */
  async turn(signal) {
    const wakeAll = () => this.#wakeAll();
    const online = () => this.#online();
    addEventListener("online", online);
    signal.addEventListener("abort", wakeAll);
    // After any wake-up only the clock decides whether the try may begin.
    while (!signal.aborted && (this.#trying || this.#left() > 0)) await this.#change();
    signal.removeEventListener("abort", wakeAll);
    removeEventListener("online", online);
    if (signal.aborted) return false;
    this.#lastTry = performance.now();
    if (this.#failures > 0) this.#trying = signal;
    return true;
  }

  /**
   * The try opened a stream, or was given up. Other connections try a moment later: some servers
   * open a stream and close it at once, and that is a failure.
   * @param {AbortSignal} signal
   */
  settled(signal) {
    if (this.#trying === signal) this.#end(signal, RETRY_MIN_MS);
  }

  /** The stream brought labels, or lasted long: the next failure counts as a first one. */
  delivered() {
    this.#failures = 0;
  }

  /**
   * The try failed, or its stream ended.
   * @param {AbortSignal} signal
   * @param {{askedMs?: number, answered: boolean, final: boolean}} failure  `askedMs`: how long the
   *   server asks to wait; `final`: no connection retries by itself, so the wait only slows loops
   */
  failed(signal, { askedMs = 0, answered, final }) {
    const base = final ? RETRY_MIN_MS : Math.max(RETRY_MIN_MS, this.#baseMs);
    const grown = Math.max(base, Math.min(RETRY_MAX_MS, base * 2 ** this.#failures));
    this.#failures += 1;
    this.#answered = answered;
    // Never less than asked for, and random: many readers reconnect to a restarted server.
    const wait = Math.max(grown, Math.min(askedMs, HINT_MAX_MS)) * (1 + JITTER * Math.random());
    this.retryAt = Math.round(Date.now() + wait);
    this.#end(signal, wait);
  }

  /** End the wait early, because a person wants it. */
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
    this.#wakeAll();
  }

  /** @param {AbortSignal} signal @param {number} ms */
  #end(signal, ms) {
    if (this.#trying === signal) this.#trying = null;
    this.#notBefore = Math.max(this.#notBefore, performance.now() + ms);
    this.#wakeAll();
  }

  #left() {
    return this.#notBefore - performance.now();
  }

  #wakeAll() {
    for (const wake of [...this.#waiting]) wake();
  }

  /** Wait until the time of the next try, or until something has changed. */
  async #change() {
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    await new Promise((resolve) => {
      const wake = () => resolve(this.#waiting.delete(wake));
      this.#waiting.add(wake);
      // The wait is at most `HINT_MAX_MS` with jitter: a timer over 2^31 - 1 ms fires at once.
      if (!this.#trying) timer = setTimeout(wake, Math.ceil(this.#left()));
    });
    clearTimeout(timer);
  }
}
