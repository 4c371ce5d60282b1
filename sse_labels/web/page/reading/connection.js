// @ts-check
/**
 * One connection to the server: opens it, reads it to its end, and waits until the next try.
 *
 * Promises: its readers get every event after its position, once and in order; it reads no
 * faster than they do; how it ended is told in the server's words.
 * Does not belong here: which reader has which connection (`hub.js`).
 */

import { Parser } from "./parser.js";
import { covers, streamUrl, union } from "./filter.js";

/** @typedef {import("../labels.js").Filter} Filter */
/** @typedef {import("../labels.js").LabelEvent} LabelEvent */
/** @typedef {import("../labels.js").State} State */
/** @typedef {import("../labels.js").StateName} StateName */
/** @typedef {import("./hub.js").Hub} Hub */
/** @typedef {import("./hub.js").Reader} Reader */
/** @typedef {import("./parser.js").Block} Block */

/** How long a page that does not read is waited for, if others read along. */
const PATIENCE_MS = 2000;
/** Silence after which a connection is taken for dead: three heartbeats, if the server says. */
const HEARTBEAT_SECONDS = 15;
const HEARTBEATS_MISSED = 3;
/** How long until the next try, when the server does not say; doubled each time … */
const RETRY_MS = 2000;
/** … up to here. */
const RETRY_MAX_MS = 30_000;

/** How a connection ended, or did not begin.
 * @typedef {object} End
 * @property {"lost" | "too-slow" | "refused" | "epoch" | "again"} how
 * @property {string} message
 * @property {string} [error]
 * @property {number} [status]
 * @property {number} [retryMs]  what the server asked for
 */

/** Errors of the stream that do not only mean "come back". @type {Record<string, End["how"]>} */
const HOW = { ConsumerTooSlow: "too-slow", EpochChanged: "epoch" };

/** One connection to the server, opened again as often as it takes; it has one position. */
export class Connection {
  /** @type {Set<Reader>} */ readers = new Set();
  /** Events up to here were given to the readers; null: from now, and not open yet.
   * @type {number | null} */
  position;
  /** It has been where the newest labels are. */
  isLive;

  /** @type {Hub} */ #hub;
  /** @type {string | null} */ #epoch;
  /** What the server is asked for; null: not yet. @type {Required<Filter> | null} */
  #filter = null;
  /** @type {AbortController} */ #abort = new AbortController();
  /** @type {End | null} */ #ended = null;
  isOpen = false;
  #closed = false;
  #head = 0;
  #failures = 0;
  #retryMs = RETRY_MS;
  #heartbeatMs = 1000 * HEARTBEAT_SECONDS;
  /** @type {number | undefined} */ #retryAt;
  /** Ends what it waits for. @type {() => void} */ #wake = () => {};

  /**
   * @param {Hub} hub
   * @param {number | null} cursor
   * @param {string | null} epoch
   */
  constructor(hub, cursor, epoch) {
    this.#hub = hub;
    this.position = cursor;
    this.isLive = cursor === null;
    this.#epoch = epoch;
  }

  /** @param {Reader} reader  at this position or in front of it; else it goes back for it */
  add(reader) {
    this.readers.add(reader);
    reader.connection = this;
    const known = this.#epoch;
    if (reader.epoch !== null && known !== null && reader.epoch !== known) {
      this.#tellEpochChanged(reader, "the database was rebuilt");
      return;
    }
    if (reader.cursor === null) reader.cursor = this.position;
    if (reader.cursor !== null && this.position !== null && reader.cursor < this.position) {
      this.position = reader.cursor;
      this.#again("an earlier start is wanted");
    } else if (this.#filter && !covers(this.#filter, reader.filter)) {
      this.#again("more is wanted");
    }
    if (this.#ended?.how === "refused") this.retry();
    this.tellState();
  }

  /** @param {Reader} reader */
  remove(reader) {
    this.readers.delete(reader);
    if (this.readers.size === 0) this.#close();
    this.#wake();
  }

  readerHasRead() {
    this.#wake();
  }

  /** Stop waiting for the next try. */
  retry() {
    this.#failures = 0;
    this.#ended = null;
    this.#wake();
    this.tellState();
  }

  tellState() {
    const state = this.#state();
    for (const reader of this.readers) reader.tell(state);
  }

  /** Read until nobody is left who wants it. */
  async run() {
    while (!this.#closed) {
      const end = await this.#read();
      this.isOpen = false;
      if (this.#closed) break;
      if (end.how === "again") continue;
      if (end.how === "epoch") {
        for (const reader of [...this.readers]) this.#tellEpochChanged(reader, end.message);
        break;
      }
      this.#ended = end;
      if (end.how === "refused") await this.#whileRefused();
      else await this.#untilNextTry(end);
    }
    this.#close();
  }

  #close() {
    this.#closed = true;
    this.#abort.abort();
    this.#hub.forget(this);
    this.#wake();
  }

  /** Open the connection anew, because of what its readers want. @param {string} message */
  #again(message) {
    this.#filter = null;
    this.#abort.abort({ how: "again", message });
    this.#wake();
  }

  /** @returns {State} */
  #state() {
    const more = { readers: this.#hub.readers.size, epoch: this.#epoch ?? undefined };
    if (this.isOpen) {
      const head = Math.max(this.#head, this.position ?? 0);
      return this.isLive
        ? { name: "live", message: "connected", head, ...more }
        : { name: "catching-up", message: "reading what was published before", head, ...more };
    }
    const end = this.#ended;
    if (end === null) return { name: "connecting", message: "connecting …", ...more };
    const { message, error, status } = end;
    /** @type {StateName} */
    const name = end.how === "refused" || end.how === "too-slow" ? end.how : "reconnecting";
    return { name, message, error, status, retryAt: this.#retryAt, ...more };
  }

  /** @param {End} end */
  async #untilNextTry(end) {
    const asked = end.retryMs ?? Math.min(RETRY_MAX_MS, this.#retryMs * 2 ** this.#failures);
    this.#failures += 1;
    // Never less than asked for, and never all at once: a server that comes back has many readers.
    const wait = asked * (1 + Math.random() / 2);
    this.#retryAt = Math.round(Date.now() + wait);
    this.tellState();
    const wake = () => this.#wake();
    addEventListener("online", wake);
    await this.#sleep(wait);
    removeEventListener("online", wake);
    this.#retryAt = undefined;
  }

  async #whileRefused() {
    this.tellState();
    while (!this.#closed && this.#ended !== null) await this.#sleep(RETRY_MAX_MS);
  }

  /** Sleep, at most until somebody wakes it. @param {number} ms */
  async #sleep(ms) {
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    await new Promise((resolve) => {
      timer = setTimeout(resolve, ms);
      this.#wake = () => resolve(undefined);
    });
    clearTimeout(timer);
    this.#wake = () => {};
  }

  /** Open the connection and read to its end. @returns {Promise<End>} */
  async #read() {
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    this.#filter = union([...this.readers].map((reader) => reader.filter));
    const url = streamUrl(this.#hub.url, this.position, this.#epoch, this.#filter);
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let silence;
    const listen = () => {
      clearTimeout(silence);
      const lost = { how: "lost", message: "the server was silent for too long" };
      silence = setTimeout(() => this.#abort.abort(lost), HEARTBEATS_MISSED * this.#heartbeatMs);
    };
    try {
      listen();
      const { credentials, token } = this.#hub;
      /** @type {HeadersInit} */
      const headers = token ? { Authorization: `Bearer ${await token()}` } : {};
      const response = await fetch(url, { cache: "no-store", credentials, headers, signal });
      const type = response.headers.get("Content-Type") ?? "";
      if (!response.ok || !response.body || !type.startsWith("text/event-stream")) {
        return await refusal(response, type);
      }
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      const parser = new Parser();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return { how: "lost", message: "the connection ended" };
        listen();
        const end = this.#take(parser.push(value));
        if (end) {
          this.#abort.abort();
          return end;
        }
        await this.#room();
        if (signal.aborted) return signal.reason;
      }
    } catch (error) {
      if (isEnd(signal.reason)) return signal.reason;
      // What `token` throws is for people, too; what `fetch` throws tells them nothing.
      const message = error instanceof TypeError ? "the server cannot be reached" : String(error);
      return { how: "lost", message };
    } finally {
      clearTimeout(silence);
    }
  }

  /**
   * Give the readers what came.
   * @param {Block[]} blocks
   * @returns {End | null}
   */
  #take(blocks) {
    /** @type {LabelEvent[]} */
    let events = [];
    const flush = () => {
      if (this.position === null) return;
      for (const reader of this.readers) reader.give(events, this.position);
      events = [];
    };
    for (const { id, event, data, retry } of blocks) {
      if (retry !== null) this.#retryMs = retry;
      if (event === "message" && data !== null) events.push(JSON.parse(data));
      if (id !== null) this.position = Number(id);
      if (event === "info" && data !== null) {
        flush();
        this.#hearInfo(JSON.parse(data));
      } else if (event === "error" && data !== null) {
        flush();
        const { error, message } = JSON.parse(data);
        const retryMs = retry ?? undefined;
        return { how: HOW[error] ?? "lost", message, error, retryMs };
      }
    }
    flush();
    this.lookWhere();
    return null;
  }

  /** @param {any} info */
  #hearInfo(info) {
    if (info.name !== "StreamOpened") {
      for (const reader of this.readers) {
        const concerned = info.floor === undefined || (reader.cursor ?? info.floor) < info.floor;
        if (concerned) reader.tellNews(info);
      }
      return;
    }
    this.isOpen = true;
    this.#ended = null;
    this.#failures = 0;
    this.#head = info.head;
    this.#epoch = info.epoch;
    if (info.heartbeatSeconds) this.#heartbeatMs = 1000 * info.heartbeatSeconds;
    for (const reader of [...this.readers]) {
      if (reader.epoch !== null && reader.epoch !== info.epoch) {
        this.#tellEpochChanged(reader, "the database was rebuilt");
      }
    }
    this.lookWhere();
    this.tellState();
  }

  /** See whether history is done. */
  lookWhere() {
    if (this.isLive || !this.isOpen || Number(this.position) < this.#head) return;
    if (this.#hub.merge(this)) return;
    this.isLive = true;
    this.tellState();
  }

  /** Wait until the readers can take more; so the server waits, too. */
  async #room() {
    const patience = Date.now() + PATIENCE_MS;
    const { signal } = this.#abort;
    while (!signal.aborted && [...this.readers].some((reader) => !reader.hasRoom)) {
      const left = patience - Date.now();
      if (left <= 0) {
        const slow = [...this.readers].filter((reader) => !reader.hasRoom);
        if (slow.length < this.readers.size) {
          for (const reader of slow) this.#hub.leaveBehind(reader);
          return;
        }
      }
      await this.#sleep(left > 0 ? left : RETRY_MAX_MS);
    }
  }

  /** @param {Reader} reader @param {string} message */
  #tellEpochChanged(reader, message) {
    reader.connection = null;
    this.remove(reader);
    reader.tellNews({ name: "EpochChanged", message });
  }
}

/** @param {unknown} reason @returns {reason is End} */
function isEnd(reason) {
  return typeof reason === "object" && reason !== null && "how" in reason;
}

/**
 * What an answer that is no stream means.
 * @param {Response} response
 * @param {string} type
 * @returns {Promise<End>}
 */
async function refusal(response, type) {
  const { status } = response;
  /** @type {{error?: string, message?: string}} */
  let said = {};
  try {
    said = await response.json();
  } catch {
    // Not by the service: a proxy's page, perhaps.
  }
  const error = said.error;
  if (response.ok) {
    return { how: "refused", status, message: `not an event stream, but ${type || "nothing"}` };
  }
  const message = said.message ?? `the answer was ${status} ${response.statusText}`.trim();
  if (error === "EpochChanged") return { how: "epoch", status, error, message };
  if (status !== 408 && status !== 425 && status !== 429 && status < 500) {
    return { how: "refused", status, error, message };
  }
  const seconds = Number(response.headers.get("Retry-After") ?? NaN);
  const retryMs = seconds >= 0 ? 1000 * seconds : undefined;
  return { how: "lost", status, error, message, retryMs };
}
