// @ts-check
/** Shows the state of the connection as a text, and the list of past states. */

import { byId, element, shown } from "./document.js";

/** @typedef {import("../labels.js").State} State */
/** @typedef {import("../labels.js").News} News */

const HAPPENED_MAX = 20;

/** The text of a state, by the server's name of the error, else by the name of the state. */
const WORDS = {
  TooManyConnections: "The server is full",
  TooManyFromAddress: "Too many connections from your address",
  ServerStopping: "The server restarts",
  NotReady: "The server is not ready",
  TokenExpired: "Your token has expired",
  connecting: "Connecting …",
  "catching-up": "Catching up",
  live: "Live",
  reconnecting: "Reconnecting",
  "too-slow": "This page was too slow",
  refused: "Refused",
  resting: "Resting",
  closed: "Closed",
};

export class Status {
  /** @type {State} */ #state = { name: "connecting", message: "" };
  /** @type {number | null} */ #position = null;
  #last = "";

  constructor() {
    setInterval(() => this.#draw(), 1000);
  }

  /** @param {State} state @param {number | null} position */
  show(state, position) {
    this.#state = state;
    this.#position = position;
    const { name, error, notReady } = state;
    const what = `${name} ${error ?? ""} ${notReady ?? ""}`;
    if (what !== this.#last) {
      this.#last = what;
      if (name !== "connecting") this.#note(this.#words(false));
    }
    this.#draw();
  }

  /** @param {News} news */
  news({ name, message }) {
    this.#note(`${name}: ${message}`);
  }

  #draw() {
    const { name, notReady } = this.#state;
    byId("state").dataset.state = notReady === undefined ? name : "not-ready";
    byId("retry").hidden = !["reconnecting", "too-slow", "refused"].includes(name);
    const words = this.#words(true);
    const place = byId("state-words");
    if (place.textContent !== words) place.textContent = words;
  }

  /** @param {boolean} now  include the parts that change every second */
  #words(now) {
    const { name, error, message, notReady, retryAt, readers } = this.#state;
    const known = /** @type {Record<string, string>} */ (WORDS);
    if (notReady !== undefined) return `${WORDS.NotReady}: ${notReady}${this.#resumes()}`;
    const words = [(error && known[error]) || known[name]];
    if (name === "live" || name === "catching-up") {
      if (now && readers && readers > 1) words.push(` · one connection for ${readers} tabs`);
    } else if (name !== "connecting") {
      words.push(`: ${message}`);
      if (name !== "refused") words.push(this.#resumes());
    }
    if (now && retryAt) {
      const left = Math.max(0, Math.ceil((retryAt - Date.now()) / 1000));
      words.push(left ? ` Next try in ${time(left)}.` : " Trying …");
    }
    return words.join("");
  }

  #resumes() {
    if (this.#position === null) return ".";
    return `. Goes on after ${shown(this.#position)}; nothing is lost.`;
  }

  /** @param {string} text */
  #note(text) {
    const item = element("li", "", text);
    const when = element("time", "", new Date().toLocaleTimeString("en-GB"));
    item.prepend(when);
    const list = byId("happened");
    list.prepend(item);
    while (list.childElementCount > HAPPENED_MAX) list.lastElementChild?.remove();
  }
}

/** @param {number} seconds */
function time(seconds) {
  return seconds < 120 ? `${seconds} s` : `${Math.ceil(seconds / 60)} min`;
}
