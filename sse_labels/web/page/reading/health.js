// @ts-check
/**
 * Asks whether the server is ready while its stream is open: without this, a database that is away
 * looks like a stream without labels.
 *
 * Promises: the server is asked only while a stream is open and a reader wants the answer. A server
 * that does not answer is not asked again until the next stream opens.
 */

/** How often the server is asked. */
const ASK_MS = 5000;

export class Health {
  /** Why labels may not come now. undefined: they come, or it is not known.
   * @type {string | undefined} */
  notReady;
  /** The newest seq that the server has sent. */
  head = 0;

  /** @type {ReturnType<typeof setInterval> | undefined} */ #timer;

  /** @param {string} url  of the stream @param {() => void} changed */
  constructor(url, changed) {
    this.url = new URL("health/ready", url);
    this.changed = changed;
  }

  /** @param {boolean} wanted  true while a stream is open and a reader wants the answer */
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
      // A proxy does not pass this address on, or pages of this origin may not read it.
      clearInterval(timer);
    }
    if (timer !== this.#timer) return;
    this.head = Math.max(this.head, head ?? 0);
    this.notReady = notReady;
    this.changed();
  }
}
