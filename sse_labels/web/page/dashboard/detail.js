// @ts-check
/** A dialog that shows one label with all its fields. */

import { byId, element, on } from "./document.js";

/** @typedef {import("../labels.js").LabelEvent} LabelEvent */

/** @type {Record<string, string>} */
const MEANINGS = {
  seq: "seq",
  val: "value",
  neg: "takes back",
  uri: "subject",
  cid: "version (CID)",
  src: "source",
  cts: "made",
  exp: "expires",
  sig: "signature",
  ver: "format",
};

export class Detail {
  #dialog = /** @type {HTMLDialogElement} */ (byId("detail"));
  /** @type {LabelEvent | null} */ #event = null;

  /** @param {(name: "values" | "sources" | "prefix", entry: string) => void} narrow */
  constructor(narrow) {
    on("detail-close", "click", () => this.#dialog.close());
    this.#dialog.addEventListener("click", ({ target }) => {
      // A click on the backdrop has the dialog as its target. A click inside has another element.
      if (target === this.#dialog) this.#dialog.close();
      const only = target instanceof HTMLElement ? target.dataset.only : undefined;
      if (!only || !this.#event) return;
      const { val, src, uri } = this.#event.labels[0];
      this.#dialog.close();
      const name = /** @type {"values" | "sources" | "prefix"} */ (only);
      narrow(name, { values: val, sources: src, prefix: uri }[name]);
    });
  }

  /** @param {LabelEvent} event */
  show(event) {
    this.#event = event;
    const { seq, labels } = event;
    const fields = { seq, ...labels[0] };
    byId("detail-title").textContent = `Label ${seq}`;
    byId("detail-fields").replaceChildren(
      ...Object.keys(MEANINGS)
        .filter((name) => name in fields)
        .flatMap((name) => {
          const value = fields[/** @type {keyof typeof fields} */ (name)];
          const text = typeof value === "object" ? value.$bytes : String(value);
          return [element("dt", "", MEANINGS[name]), element("dd", "mono", text)];
        }),
    );
    byId("detail-json").textContent = JSON.stringify(event, null, 2);
    this.#dialog.showModal();
  }
}
