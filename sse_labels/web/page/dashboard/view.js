// @ts-check
/**
 * The view: where the stream starts, and its filter. The form and the page's address both contain
 * the view, so a user can bookmark it, share it and go back to it.
 */

import { filterOf } from "../labels.js";
import { byId, input, on } from "./document.js";

/** @typedef {import("../labels.js").Filter} Filter */
/** @typedef {import("../labels.js").From} From */

const STARTS = ["now", "left-off", "everything"];

export class View {
  /** @type {From} */ from = "now";
  /** @type {Required<Filter>} */ filter = filterOf({});

  /** @param {() => void} changed */
  constructor(changed) {
    this.changed = changed;
    on("view", "submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    on("view", "reset", (event) => {
      event.preventDefault();
      for (const id of ["values", "sources", "prefix", "seq"]) input(id).value = "";
      input("from").value = "now";
      this.#showSeq();
      this.#submit();
    });
    on("from", "change", () => this.#showSeq());
    addEventListener("popstate", () => {
      this.#read();
      this.changed();
    });
    this.#read();
  }

  /**
   * Show only one value, source or prefix of the shown labels. "Now" and "where I left off" mean
   * another seq by then, so the address gets the seq of the start.
   * @param {"values" | "sources" | "prefix"} id
   * @param {string} entry
   * @param {number | null} start  the seq after which the shown labels begin; null: none was shown
   */
  narrow(id, entry, start) {
    input(id).value = entry;
    if (start !== null && typeof this.from === "string" && this.from !== "everything") {
      input("from").value = "seq";
      input("seq").value = String(start);
      this.#showSeq();
    }
    this.#submit();
  }

  #submit() {
    const wrong = byId("wrong");
    wrong.hidden = true;
    try {
      this.#take();
    } catch (error) {
      wrong.textContent = error instanceof Error ? error.message : String(error);
      wrong.hidden = false;
      return;
    }
    history.pushState(null, "", this.#address());
    this.changed();
  }

  /** Read the form. @throws {TypeError} */
  #take() {
    const start = input("from").value;
    const seq = input("seq").value.trim();
    if (start === "seq" && !/^\d{1,15}$/.test(seq)) {
      throw new TypeError(`seq: got '${seq}', expected the last seq you have`);
    }
    // The prefix is not split at commas: the field contains one prefix only.
    const prefix = input("prefix").value.trim();
    const filter = filterOf({
      values: entries("values"),
      sources: entries("sources"),
      uriPatterns: prefix ? [prefix.endsWith("*") ? prefix : `${prefix}*`] : [],
    });
    this.filter = filter;
    this.from = start === "seq" ? Number(seq) : /** @type {From} */ (start);
  }

  /** Fill the form from the address. */
  #read() {
    const asked = new URLSearchParams(location.search);
    const from = asked.get("from") ?? "now";
    const named = STARTS.includes(from);
    input("from").value = named ? from : "seq";
    input("seq").value = named ? "" : from;
    input("values").value = asked.getAll("values").join(", ");
    input("sources").value = asked.getAll("sources").join(", ");
    input("prefix").value = asked.get("prefix") ?? "";
    this.#showSeq();
    byId("wrong").hidden = true;
    try {
      this.#take();
    } catch (error) {
      byId("wrong").textContent = String(error);
      byId("wrong").hidden = false;
    }
  }

  #address() {
    const said = new URLSearchParams();
    if (this.from !== "now") said.set("from", String(this.from));
    for (const value of this.filter.values) said.append("values", value);
    for (const source of this.filter.sources) said.append("sources", source);
    if (input("prefix").value.trim()) said.set("prefix", input("prefix").value.trim());
    const query = said.toString();
    return query ? `?${query}` : location.pathname;
  }

  #showSeq() {
    byId("seq-label").hidden = input("from").value !== "seq";
  }
}

/** The entries of a field, which commas separate. @param {string} id */
function entries(id) {
  return input(id)
    .value.split(",")
    .map((entry) => entry.trim())
    .filter(Boolean);
}
