// @ts-check
/**
 * The number of labels by value, or by source.
 *
 * Promises: at most `KEYS_MAX` values have their own count. All others share one count.
 */

import { element, shown } from "./document.js";

const KEYS_MAX = 1000;
const SHOWN_MAX = 8;

export class Counts {
  /** @type {Map<string, number>} */ #counts = new Map();
  #others = 0;
  #changed = true;

  /**
   * @param {HTMLElement} list
   * @param {(key: string) => void} choose  called when the user clicks a value
   */
  constructor(list, choose) {
    this.list = list;
    list.addEventListener("click", ({ target }) => {
      const button = target instanceof Element && target.closest("button");
      if (button) choose(button.dataset.key ?? "");
    });
  }

  /** @param {string} key */
  add(key) {
    const count = this.#counts.get(key);
    if (count === undefined && this.#counts.size >= KEYS_MAX) this.#others += 1;
    else this.#counts.set(key, (count ?? 0) + 1);
    this.#changed = true;
  }

  clear() {
    this.#counts.clear();
    this.#others = 0;
    this.#changed = true;
  }

  draw() {
    // Nothing moves under the pointer of a user who is about to click.
    if (!this.#changed || this.list.matches(":hover, :focus-within")) return;
    this.#changed = false;
    const all = [...this.#counts].sort((one, other) => other[1] - one[1]);
    const most = all[0]?.[1] ?? 1;
    /** @type {HTMLElement[]} */
    const items = all.slice(0, SHOWN_MAX).map(([key, count]) => {
      const button = element("button", "");
      button.dataset.key = key;
      button.title = `Show only ${key}`;
      button.style.setProperty("--share", `${(100 * count) / most}%`);
      button.append(element("span", "", key), " ", element("span", "", shown(count)));
      const item = document.createElement("li");
      item.append(button);
      return item;
    });
    const rest = all.slice(SHOWN_MAX).reduce((sum, [, count]) => sum + count, this.#others);
    if (rest) items.push(element("li", "more", `and ${shown(rest)} of others`));
    if (!all.length) items.push(element("li", "more", "Nothing yet."));
    this.list.replaceChildren(...items);
  }
}
