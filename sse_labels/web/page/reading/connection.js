// @ts-check
/**
 * One connection to the server: opens it when it is its turn, and reads it to its end.
 *
 * Promises: its readers get every event after its position, once and in order; it reads no
 * faster than they do; how it ended is told in the server's words.
 * Does not belong here: which reader has which connection (`hub.js`), when it is whose turn
 * (`backoff.js`).
 */

import { RETRY_MAX_MS } from "./backoff.js";
import { covers, streamUrl, union } from "./filter.js";
import { isSeq } from "./memory.js";
import { Parser, isEventStream } from "./parser.js";

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

/** How a connection ended, or did not begin.
 * @typedef {object} End
 * @property {"lost" | "too-slow" | "refused" | "epoch" | "again"} how
 * @property {string} message
 * @property {string} [error]
 * @property {number} [status]
 * @property {number} [askedMs]  how long the server asks to wait
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
  /** Ends one answer. @type {AbortController} */ #abort = new AbortController();
  /** Ends the connection. */ #close = new AbortController();
  /** @type {End | null} */ #ended = null;
  isOpen = false;
  #openedAt = 0;
  #head = 0;
  #heartbeatMs = 1000 * HEARTBEAT_SECONDS;
  /** Lets whoever waits for readers, or for a person, look again. @type {() => void} */
  #wake = () => {};

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
    // Somebody new wants it: it is tried once more, when it may be.
    if (this.#ended?.how === "refused") this.#forgetRefusal();
    this.tellState();
  }

  /** @param {Reader} reader */
  remove(reader) {
    this.readers.delete(reader);
    if (this.readers.size === 0) this.#end();
    this.#wake();
  }

  readerHasRead() {
    this.#wake();
  }

  /** A person wants the next try now. */
  retry() {
    this.#hub.backoff.cut();
    if (this.#ended?.how === "refused") this.#forgetRefusal();
    this.#hub.tellAll();
  }

  #forgetRefusal() {
    this.#ended = null;
    this.#wake();
  }

  tellState() {
    const state = this.#state();
    for (const reader of this.readers) reader.tell(state);
  }

  /** Read until nobody is left who wants it. */
  async run() {
    const { backoff } = this.#hub;
    const { signal } = this.#close;
    while (await backoff.turn(signal)) {
      const end = await this.#read();
      // An idle stream brings nothing: that it lasted is good enough.
      if (this.isOpen && performance.now() - this.#openedAt > RETRY_MAX_MS) backoff.delivered();
      this.isOpen = false;
      if (signal.aborted || end.how === "again") {
        backoff.settled(signal);
        continue;
      }
      this.#ended = end;
      const answered = end.error !== undefined || end.status !== undefined;
      const final = end.how === "refused" || end.how === "epoch";
      backoff.failed(signal, { askedMs: end.askedMs, answered, final });
      if (end.how === "epoch") {
        for (const reader of [...this.readers]) this.#tellEpochChanged(reader, end.message);
        break;
      }
      this.#hub.tellAll();
      while (!signal.aborted && this.#ended?.how === "refused") await this.#woken();
    }
    this.#end();
  }

  #end() {
    this.#close.abort();
    this.#abort.abort();
    this.#hub.forget(this);
    this.#wake();
  }

  /** Open the connection anew, because of what its readers want. @param {string} message */
  #again(message) {
    this.#filter = null;
    this.isOpen = false;
    this.#abort.abort({ how: "again", message });
    this.#wake();
  }

  /** @returns {State} */
  #state() {
    const more = { readers: this.#hub.readers.size, epoch: this.#epoch ?? undefined };
    if (this.isOpen) {
      const { health } = this.#hub;
      const head = Math.max(this.#head, health.head, this.position ?? 0);
      const { notReady } = health;
      /** @type {StateName} */
      const name = this.isLive ? "live" : "catching-up";
      const message = this.isLive ? "connected" : "reading what was published before";
      return { name, message: notReady ?? message, head, notReady, ...more };
    }
    const end = this.#ended;
    const { retryAt } = this.#hub.backoff;
    if (end === null) return { name: "connecting", message: "connecting …", retryAt, ...more };
    const { message, error, status } = end;
    if (end.how === "refused") return { name: "refused", message, error, status, ...more };
    /** @type {StateName} */
    const name = end.how === "too-slow" ? "too-slow" : "reconnecting";
    return { name, message, error, status, retryAt, ...more };
  }

  /** Wait until somebody wakes it, at most `ms` if they are given. @param {number} [ms] */
  async #woken(ms) {
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    await new Promise((resolve) => {
      this.#wake = () => resolve(undefined);
      if (ms !== undefined) timer = setTimeout(this.#wake, ms);
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
      if (!response.ok || !response.body || !isEventStream(type)) {
        return await refusal(response, type);
      }
      const reader = response.body.getReader();
      const parser = new Parser();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return { how: "lost", message: "the connection ended" };
        clearTimeout(silence);
        const blocks = parser.push(value);
        if (parser.retry !== null) this.#hub.backoff.hint(parser.retry);
        const end = this.#understand(blocks);
        if (end) {
          this.#abort.abort();
          return end;
        }
        await this.#room();
        if (signal.aborted) return signal.reason;
        listen();
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

  /** @param {Block[]} blocks @returns {End | null} */
  #understand(blocks) {
    try {
      return this.#take(blocks);
    } catch (error) {
      return { how: "refused", message: `this is no stream of labels: ${error}` };
    }
  }

  /**
   * Give the readers what came.
   * @param {Block[]} blocks
   * @returns {End | null}
   * @throws {Error} when it is not what a stream of labels sends
   */
  #take(blocks) {
    /** @type {LabelEvent[]} */
    let events = [];
    const flush = () => {
      if (this.position === null) return;
      for (const reader of this.readers) reader.give(events, this.position);
      events = [];
    };
    for (const { id, event, data } of blocks) {
      if (event === "message" && data !== null) events.push(JSON.parse(data));
      // Without an id, or with an empty one, the last seq is still the best place to go on from.
      if (id !== "") this.#moveTo(seqOf(id));
      if (event === "info" && data !== null) {
        flush();
        this.#hearInfo(JSON.parse(data));
      } else if (event === "error" && data !== null) {
        flush();
        const { error, message } = JSON.parse(data);
        return { how: HOW[error] ?? "lost", message, error };
      }
    }
    flush();
    this.lookWhere();
    return null;
  }

  /** @param {number} seq */
  #moveTo(seq) {
    if (this.isOpen && this.position !== null && seq > this.position) {
      this.#hub.backoff.delivered();
    }
    this.position = seq;
  }

  /** @param {any} info */
  #hearInfo(info) {
    // Its id has moved the position; that is all it says.
    if (info.name === "CaughtUp") return;
    if (info.name !== "StreamOpened") {
      for (const reader of this.readers) {
        const concerned = info.floor === undefined || (reader.cursor ?? info.floor) < info.floor;
        if (concerned) reader.tellNews(info);
      }
      return;
    }
    this.isOpen = true;
    this.#ended = null;
    this.#openedAt = performance.now();
    this.#hub.backoff.settled(this.#close.signal);
    this.#head = info.head;
    this.#epoch = info.epoch;
    if (info.heartbeatSeconds) this.#heartbeatMs = 1000 * info.heartbeatSeconds;
    for (const reader of [...this.readers]) {
      if (reader.epoch !== null && reader.epoch !== info.epoch) {
        this.#tellEpochChanged(reader, "the database was rebuilt");
      }
    }
    this.lookWhere();
    this.#hub.tellAll();
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
      await this.#woken(left > 0 ? left : undefined);
    }
  }

  /** @param {Reader} reader @param {string} message */
  #tellEpochChanged(reader, message) {
    reader.connection = null;
    this.remove(reader);
    reader.tellNews({ name: "EpochChanged", message });
  }
}

/** @param {string} id @throws {Error} */
function seqOf(id) {
  const seq = Number(id);
  if (!/^\d+$/.test(id) || !isSeq(seq)) throw new Error(`its event id is ${JSON.stringify(id)}`);
  return seq;
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
  const askedMs = retryAfterMs(response.headers.get("Retry-After") ?? "");
  return { how: "lost", status, error, message, askedMs };
}

/** Seconds or a date (RFC 9110, section 10.2.3). @param {string} value */
function retryAfterMs(value) {
  if (/^\d+$/.test(value)) return 1000 * Number(value);
  return value.endsWith("GMT") ? Math.max(0, Date.parse(value) - Date.now()) || 0 : 0;
}
