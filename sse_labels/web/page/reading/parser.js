// @ts-check
/**
 * Cuts an event stream into blocks, as in the HTML standard (9.2.6).
 *
 * Does not belong here: the meaning of the blocks.
 */

/**
 * `id` is the last event ID, also from an earlier block. `event` is "message" when the block names
 * no event. `data` is null when the block has none: `EventSource` dispatches nothing then.
 * @typedef {{id: string, event: string, data: string | null}} Block
 */

/** Unlike `EventSource` it also returns blocks without data: an id alone is a position. */
export class Parser {
  /** The last `retry:` in ms. It applies from its line on. @type {number | null} */
  retry = null;

  /** Always UTF-8, even if the answer names another encoding. */
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  /** One byte order mark is dropped at the begin. Node's decoder drops two when the first one comes
   * in parts. */
  #atBegin = true;
  #rest = "";
  /** The last character was a CR. A LF after it belongs to the same line end. */
  #afterCr = false;
  /** @type {string[]} */ #data = [];
  #event = "";
  #id = "";

  /** @param {Uint8Array} bytes @returns {Block[]} */
  push(bytes) {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (text === "") return [];
    if (this.#atBegin && text.startsWith("\ufeff")) text = text.slice(1);
    this.#atBegin = false;
    if (this.#afterCr && text.startsWith("\n")) text = text.slice(1);
    this.#afterCr = text === "" ? false : text.endsWith("\r");
    const lines = (this.#rest + text).split(/\r\n|\n|\r/);
    this.#rest = lines.pop() ?? "";
    /** @type {Block[]} */
    const blocks = [];
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
    else if (name === "id" && !value.includes("\0")) this.#id = value;
    else if (name === "retry" && /^[0-9]+$/.test(value)) this.retry = Number(value);
  }

  /** @returns {Block} */
  #block() {
    const data = this.#data.length ? this.#data.join("\n") : null;
    const block = { id: this.#id, event: this.#event || "message", data };
    this.#data = [];
    this.#event = "";
    return block;
  }
}

/** Whether a Content-Type is that of an event stream, with any parameters and case.
 * @param {string} type
 */
export function isEventStream(type) {
  return type.split(";", 1)[0].trim().toLowerCase() === "text/event-stream";
}
