// @ts-check
/**
 * The position, the head, and the distance between them.
 */

import { byId, input, shown } from "./document.js";

export class Head {
  #head = 0;
  /** The first position: the progress bar starts there. @type {number | null} */ #start = null;

  clear() {
    this.#start = null;
    this.#head = 0;
  }

  /** @param {number} head */
  raise(head) {
    this.#head = Math.max(this.#head, head);
  }

  /** @param {number | null} position */
  draw(position) {
    if (position === null) return;
    this.raise(position);
    this.#start ??= position;
    const behind = this.#head - position;
    byId("position").textContent = shown(position);
    byId("head").textContent = shown(this.#head);
    byId("behind").textContent = shown(behind);
    const progress = input("progress");
    progress.hidden = behind === 0 || byId("state").dataset.state !== "catching-up";
    progress.setAttribute("max", String(this.#head - this.#start || 1));
    progress.setAttribute("value", String(position - this.#start));
  }
}
