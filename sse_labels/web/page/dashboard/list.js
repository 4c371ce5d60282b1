// @ts-check
/**
 * The list of labels, newest first.
 *
 * Promises: the list never has more than `ROWS_MAX` rows. Rows do not move while a user reads: new
 * labels are held while the user has scrolled down, has a row in focus, points at a row or has
 * paused the list. Only the newest `ROWS_MAX` labels are held.
 */

import { byId, element, on, shown } from "./document.js";

/** @typedef {import("../labels.js").LabelEvent} LabelEvent */

const ROWS_MAX = 200;
/** How often rows are drawn: nobody could read rows that change more often. */
const DRAW_MS = 200;
/** How long after a move over the rows the user still points at a row. */
const AIM_MS = 2000;

export class List {
  /** Events that are not drawn yet, oldest first. @type {LabelEvent[]} */ #held = [];
  /** The number of events since the last drawing. */
  #came = 0;
  /** @type {WeakMap<Element, LabelEvent>} */ #events = new WeakMap();
  #paused = false;
  #aimedAt = -Infinity;
  #rows = byId("rows");
  #scroller = byId("scroller");

  /** @param {(event: LabelEvent) => void} open  called when the user clicks a row */
  constructor(open) {
    this.#rows.addEventListener("click", ({ target }) => {
      const row = target instanceof Element && target.closest("li");
      const event = row && this.#events.get(row);
      if (event) open(event);
    });
    this.#scroller.addEventListener("keydown", (event) => this.#move(event));
    this.#rows.addEventListener("pointermove", ({ pointerType }) => {
      if (pointerType === "mouse") this.#aimedAt = performance.now();
    });
    this.#rows.addEventListener("pointerleave", () => (this.#aimedAt = -Infinity));
    on("pause", "click", () => this.#pause(!this.#paused));
    on("show-held", "click", () => this.#show());
    setInterval(() => this.#draw(), DRAW_MS);
  }

  /** @param {LabelEvent[]} events  in order */
  add(events) {
    this.#came += events.length;
    this.#held.push(...events.slice(-ROWS_MAX));
    if (this.#held.length > ROWS_MAX) this.#held = this.#held.slice(-ROWS_MAX);
  }

  clear() {
    this.#rows.replaceChildren();
    this.#held = [];
    this.#came = 0;
    byId("empty").hidden = false;
    this.#showHeld(null);
  }

  /** The reason why rows may not move now, as a text. null: rows may move. */
  #why() {
    if (this.#paused) return "paused";
    if (document.querySelector("dialog[open]")) return "paused while you look at one";
    if (this.#rows.contains(document.activeElement)) return "paused while a row is in focus";
    if (this.#scroller.scrollTop > 4) return "paused while you read further down";
    if (performance.now() - this.#aimedAt < AIM_MS) return "paused while you point at a row";
    return null;
  }

  #draw() {
    if (document.visibilityState === "hidden") return;
    const why = this.#why();
    if (why === null && this.#held.length) this.#insert();
    this.#showHeld(why);
  }

  /** @param {string | null} why */
  #showHeld(why) {
    const held = why !== null && this.#came > 0;
    setText("held", why ?? "");
    const button = byId("show-held");
    button.hidden = !held;
    if (!held) return;
    const rest = this.#came > ROWS_MAX ? `, of which the last ${ROWS_MAX}` : "";
    setText("show-held", `Show ${shown(this.#came)} new${rest}`);
  }

  #insert() {
    const fresh = document.createDocumentFragment();
    for (const event of this.#held.reverse()) fresh.append(this.#row(event));
    this.#held = [];
    this.#came = 0;
    this.#rows.prepend(fresh);
    while (this.#rows.childElementCount > ROWS_MAX) this.#rows.lastElementChild?.remove();
    byId("empty").hidden = true;
  }

  /** @param {LabelEvent} event */
  #row(event) {
    const { seq, labels } = event;
    const [{ val, neg, uri, src, cts }] = labels;
    const item = document.createElement("li");
    item.dataset.seq = String(seq);
    const row = element("button", neg ? "row neg" : "row");
    row.tabIndex = -1;
    row.append(element("span", "time", time(cts)), " ");
    row.append(element("span", "val", neg ? `not ${val}` : val), " ");
    row.append(element("span", "uri", uri), " ");
    row.append(element("span", "src", src), " ");
    row.append(element("span", "seq", String(seq)));
    item.append(row);
    this.#events.set(item, event);
    return item;
  }

  /** @param {boolean} paused */
  #pause(paused) {
    this.#paused = paused;
    const button = byId("pause");
    button.setAttribute("aria-pressed", String(paused));
    this.#draw();
  }

  /** Show the held labels at the top. */
  #show() {
    if (this.#rows.contains(document.activeElement)) this.#scroller.focus();
    this.#aimedAt = -Infinity;
    this.#scroller.scrollTop = 0;
    if (this.#held.length) this.#insert();
    this.#showHeld(this.#why());
  }

  /** Move the focus up or down through the rows. @param {KeyboardEvent} event */
  #move(event) {
    const buttons = [...this.#rows.querySelectorAll("button")];
    const here = buttons.indexOf(/** @type {HTMLButtonElement} */ (document.activeElement));
    const step = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: buttons.length - 1 };
    const there = step[/** @type {keyof typeof step} */ (event.key)];
    if (event.key === "Escape") this.#scroller.focus();
    if (there === undefined) return;
    event.preventDefault();
    buttons[Math.max(0, Math.min(there, buttons.length - 1))].focus();
  }
}

/** Write a text only when it changes: screen readers read each write aloud.
 * @param {string} id
 * @param {string} text
 */
function setText(id, text) {
  const target = byId(id);
  if (target.textContent !== text) target.textContent = text;
}

/** @param {string} cts */
function time(cts) {
  const made = new Date(cts);
  // Some labels have dates that no browser can parse.
  return Number.isNaN(made.valueOf()) ? cts : made.toLocaleTimeString("en-GB");
}
