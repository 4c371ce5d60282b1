// @ts-check
/**
 * Position against head: how far what is shown lies behind what the server has.
 *
 * The stream says the head only when it opens, so the server is asked while somebody looks. Its
 * answer also says when the database is away: then streams are open and silent.
 */

import { byId, input, shown } from "./document.js";

/** @typedef {import("./status.js").Status} Status */

const ASK_MS = 5000;

export class Head {
  #head = 0;
  /** Where what is left of history began. @type {number | null} */ #start = null;

  /** @param {Status} status */
  constructor(status) {
    this.status = status;
    setInterval(() => this.#ask(), ASK_MS);
  }

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

  async #ask() {
    if (document.visibilityState === "hidden") return;
    try {
      const answer = await fetch("/health/ready", { cache: "no-store" });
      const { head, message } = await answer.json();
      if (head !== undefined) this.raise(head);
      this.status.hint(answer.ok ? "" : (message ?? ""));
    } catch {
      // The stream says that the server is away; a proxy may keep this address to itself.
      this.status.hint("");
    }
  }
}
