// @ts-check
/** Code that reads the same stream elsewhere: a line for a terminal, lines for a page. */

import { byId } from "./document.js";

/** How long a button shows that it has copied. */
const SAID_MS = 1500;

export class Snippets {
  #href = "";

  constructor() {
    for (const button of document.querySelectorAll(".copy")) {
      button.addEventListener("click", () => copy(/** @type {HTMLElement} */ (button)));
    }
  }

  /** @param {string} href */
  show(href) {
    if (href === this.#href) return;
    this.#href = href;
    // A colon, a slash and a comma need no escape in a query, and are easier to read without one.
    const plain = href.replaceAll("%3A", ":").replaceAll("%2F", "/").replaceAll("%2C", ",");
    byId("curl").textContent = `curl -N '${plain.replaceAll("'", "%27")}'`;
    byId("js").textContent = `const source = new EventSource(${JSON.stringify(plain)});
source.onmessage = (message) => {
  const { seq, labels } = JSON.parse(message.data);
  console.log(seq, labels[0].val, labels[0].uri);
};`;
  }
}

/** @param {HTMLElement} button */
async function copy(button) {
  const from = byId(button.dataset.copies ?? "");
  const said = (await copied(from)) ? "Copied" : "Press Ctrl+C";
  const before = "Copy";
  button.textContent = said;
  setTimeout(() => (button.textContent = before), SAID_MS);
}

/** @param {HTMLElement} from @returns {Promise<boolean>}  false: the text is only selected */
async function copied(from) {
  try {
    // Browsers allow this only on https and on localhost.
    await navigator.clipboard.writeText(from.textContent ?? "");
    return true;
  } catch {
    getSelection()?.selectAllChildren(from);
    return false;
  }
}
