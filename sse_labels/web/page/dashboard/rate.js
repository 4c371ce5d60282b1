// @ts-check
/**
 * Live labels per second over the last five minutes.
 *
 * Promises: only complete seconds are shown. The current second counts after its end.
 */

import { byId, shown } from "./document.js";

const SECONDS = 300;
const BAR_SECONDS = 5;
const BARS = SECONDS / BAR_SECONDS;
const WIDTH = 300;
const HEIGHT = 60;

export class Rate {
  /** Labels in the current second and in each earlier one, by second modulo the array's length. */
  #counts = new Uint32Array(SECONDS + 1);
  #second = now();
  /** The second in which the stream became live. @type {number | null} */ #since = null;

  clear() {
    this.#counts.fill(0);
    this.#since = null;
  }

  /** Note that the stream is live. */
  start() {
    this.#since ??= now();
  }

  /** @param {number} count */
  add(count) {
    this.#turn();
    this.#counts[this.#second % this.#counts.length] += count;
  }

  draw() {
    this.#turn();
    byId("rate").textContent = shown(this.#mean(1, 1));
    const whole = this.#second - (this.#since ?? this.#second);
    byId("rate-minute").textContent = this.#mean(Math.max(1, Math.min(60, whole)), 1).toFixed(1);
    const bars = Array.from({ length: BARS }, (_, bar) =>
      this.#mean(BAR_SECONDS, 1 + (BARS - 1 - bar) * BAR_SECONDS),
    );
    const top = Math.max(1, ...bars);
    const path = bars.map((height, bar) => {
      const y = (HEIGHT * height) / top;
      return `M${(bar * WIDTH) / BARS} ${HEIGHT}v${-y}h${WIDTH / BARS - 1}v${y}z`;
    });
    byId("rate-path").setAttribute("d", path.join(""));
    byId("rate-top").textContent = `up to ${shown(Math.ceil(top))}`;
  }

  /** The mean labels per second over some seconds. @param {number} seconds @param {number} ago */
  #mean(seconds, ago) {
    let sum = 0;
    for (let second = ago; second < ago + seconds; second++) {
      sum += this.#counts.at((this.#second - second) % this.#counts.length) ?? 0;
    }
    return sum / seconds;
  }

  #turn() {
    const second = now();
    const { length } = this.#counts;
    const passed = Math.min(length, second - this.#second);
    for (let each = 0; each < passed; each++) this.#counts[(second - each) % length] = 0;
    this.#second = second;
  }
}

function now() {
  return Math.floor(performance.now() / 1000);
}
