// @ts-check
/**
 * How the server is while its stream is open: then a database that is away looks like silence.
 *
 * Promises: no question while no stream is open or nobody wants to know; a server that does not
 * answer this question is not asked again until a stream opens anew.
 */

/** How often it is asked. */
const ASK_MS = 5000;

export class Health {
  /** Why labels may not come now; undefined: they do, or nobody knows. @type {string | undefined} */
  notReady;
  /** The newest seq that the server has told. */
  head = 0;

  /** @type {ReturnType<typeof setInterval> | undefined} */ #timer;

  /** @param {string} url  of the stream @param {() => void} changed */
  constructor(url, changed) {
    this.url = new URL("health/ready", url);
    this.changed = changed;
  }

  /** @param {boolean} wanted  while a stream is open and somebody wants to know */
  watch(wanted) {
    if (wanted === (this.#timer !== undefined)) return;
    clearInterval(this.#timer);
    this.#timer = wanted ? setInterval(() => this.#ask(), ASK_MS) : undefined;
    this.notReady = undefined;
    this.head = 0;
  }

  async #ask() {
    const timer = this.#timer;
    let head, notReady;
    try {
      const signal = AbortSignal.timeout(ASK_MS);
      const answer = await fetch(this.url, { cache: "no-store", signal });
      const said = await answer.json();
      head = said.head;
      if (said.error === "NotReady") notReady = said.message;
      else if (!answer.ok) throw new Error(said.error);
    } catch {
      // A proxy keeps the address to itself, or pages of this origin may not read it.
      clearInterval(timer);
    }
    if (timer !== this.#timer) return;
    this.head = Math.max(this.head, head ?? 0);
    this.notReady = notReady;
    this.changed();
  }
}
