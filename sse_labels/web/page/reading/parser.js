// @ts-check
/**
 * Cuts the text of an event stream into blocks, as the HTML standard says (9.2.6).
 *
 * Does not belong here: what the blocks mean.
 */

/** @typedef {{id: string | null, event: string, data: string | null, retry: number | null}} Block */

/** Unlike `EventSource` it tells of blocks without data, too: an id alone is a position. */
export class Parser {
  #rest = "";
  /** @type {string[]} */ #data = [];
  #event = "";
  /** @type {string | null} */ #id = null;
  /** @type {number | null} */ #retry = null;

  /** @param {string} text @returns {Block[]} */
  push(text) {
    /** @type {Block[]} */
    const blocks = [];
    const all = this.#rest + text;
    // A CR at the end may be half of a CRLF.
    const held = all.endsWith("\r") ? 1 : 0;
    const lines = all.slice(0, all.length - held).split(/\r\n|\n|\r/);
    this.#rest = lines.pop() + all.slice(all.length - held);
    for (const line of lines) {
      if (line !== "") this.#field(line);
      else blocks.push(this.#block());
    }
    return blocks;
  }

  /** @param {string} line */
  #field(line) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const start = line[colon + 1] === " " ? colon + 2 : colon + 1;
    const value = colon < 0 ? "" : line.slice(start);
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#event = value;
    else if (name === "id" && /^\d+$/.test(value)) this.#id = value;
    else if (name === "retry" && /^\d+$/.test(value)) this.#retry = Number(value);
  }

  /** @returns {Block} */
  #block() {
    const data = this.#data.length ? this.#data.join("\n") : null;
    const block = { id: this.#id, event: this.#event || "message", data, retry: this.#retry };
    this.#data = [];
    this.#event = "";
    this.#id = null;
    this.#retry = null;
    return block;
  }
}
