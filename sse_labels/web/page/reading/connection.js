// @ts-check
/**
 * One connection to the server: opens it when the backoff allows, and reads it to its end.
 *
 * Promises: its readers get every event after its position, once and in order. It reads no faster
 * than its readers. Its state contains the server's message about the end.
 * Does not belong here: which reader has which connection (`hub.js`), when a connection may try
 * (`backoff.js`), the meaning of a refusal (`end.js`).
 */

import { RETRY_MAX_MS } from "./backoff.js";
import { endOfStream, isEnd, refusal } from "./end.js";
import { covers, streamUrl, union } from "./filter.js";
import { seqOf } from "./memory.js";
import { Parser, isEventStream } from "./parser.js";

/** @typedef {import("../labels.js").Filter} Filter */
/** @typedef {import("../labels.js").LabelEvent} LabelEvent */
/** @typedef {import("../labels.js").State} State */
/** @typedef {import("../labels.js").StateName} StateName */
/** @typedef {import("./end.js").End} End */
/** @typedef {import("./hub.js").Hub} Hub */
/** @typedef {import("./hub.js").Reader} Reader */
/** @typedef {import("./parser.js").Block} Block */

/** How long the connection waits for a page that does not read, if other pages read. */
const SLOW_READER_MS = 2000;
/** A connection counts as dead after so many missed heartbeats. The server may send another time
 * between heartbeats. */
const HEARTBEAT_SECONDS = 15;
const HEARTBEATS_MISSED = 3;

/** One connection to the server, which reconnects after a loss. It has one position. */
export class Connection {
  /** @type {Set<Reader>} */ readers = new Set();
  /** The readers got all events up to this seq. null: live only, and not open yet.
   * @type {number | null} */
  position;
  /** Whether it has reached the head. */
  isLive;

  /** @type {Hub} */ #hub;
  /** @type {string | null} */ #epoch;
  /** The filter of the request. null: there is no request yet. @type {Required<Filter> | null} */
  #filter = null;
  /** Ends the current request. @type {AbortController} */ #abort = new AbortController();
  /** Ends the connection. */ #close = new AbortController();
  /** @type {End | null} */ #ended = null;
  isOpen = false;
  #openedAt = 0;
  #head = 0;
  #heartbeatMs = 1000 * HEARTBEAT_SECONDS;
  /** Ends the wait for readers, or for a person. @type {() => void} */
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

  /** @param {Reader} reader  with an earlier cursor, the connection opens again from there */
  add(reader) {
    this.readers.add(reader);
    reader.connection = this;
    const known = this.#epoch;
    if (reader.epoch !== null && known !== null && reader.epoch !== known) {
      this.#removeForEpoch(reader, "the database was rebuilt");
      return;
    }
    if (reader.cursor === null) reader.cursor = this.position;
    if (reader.cursor !== null && this.position !== null && reader.cursor < this.position) {
      this.position = reader.cursor;
      this.#again("an earlier start is wanted");
    } else if (this.#filter && !covers(this.#filter, reader.filter)) {
      this.#again("more is wanted");
    }
    // A new reader came: the connection tries once more, when the backoff allows.
    if (this.#ended?.how === "refused") this.#forgetRefusal();
    this.postState();
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

  /** Try now, because a person wants it. */
  retry() {
    this.#hub.backoff.cut();
    if (this.#ended?.how === "refused") this.#forgetRefusal();
    this.#hub.postStates();
  }

  #forgetRefusal() {
    this.#ended = null;
    this.#wake();
  }

  postState() {
    const state = this.#state();
    for (const reader of this.readers) reader.postState(state);
  }

  /** Read until no reader is left. */
  async run() {
    const { backoff } = this.#hub;
    const { signal } = this.#close;
    while (await backoff.turn(signal)) {
      const end = await this.#read();
      // An idle stream brings no labels. A stream that lasted is good enough.
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
        for (const reader of [...this.readers]) this.#removeForEpoch(reader, end.message);
        break;
      }
      this.#hub.postStates();
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

  /** Open the connection again, because its readers need another request.
   * @param {string} message */
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

  /** Wait until `#wake` is called, at most `ms` if it is given. @param {number} [ms] */
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
      // An error of `token` is meant for people. An error of `fetch` does not help them.
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
   * Give the readers the events of these blocks.
   * @param {Block[]} blocks
   * @returns {End | null}
   * @throws {Error} when a block does not belong to a stream of labels
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
      // Without an id, or with an empty one, the position stays at the last seq.
      if (id !== "") this.#moveTo(seqOf(id));
      if (event === "info" && data !== null) {
        flush();
        this.#takeInfo(JSON.parse(data));
      } else if (event === "error" && data !== null) {
        flush();
        return endOfStream(data);
      }
    }
    flush();
    this.checkLive();
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
  #takeInfo(info) {
    // The id of the event has already moved the position.
    if (info.name === "CaughtUp") return;
    if (info.name !== "StreamOpened") {
      for (const reader of this.readers) {
        const concerned = info.floor === undefined || (reader.cursor ?? info.floor) < info.floor;
        if (concerned) reader.postNews(info);
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
        this.#removeForEpoch(reader, "the database was rebuilt");
      }
    }
    this.checkLive();
    this.#hub.postStates();
  }

  /** Check whether history is complete. */
  checkLive() {
    if (this.isLive || !this.isOpen || Number(this.position) < this.#head) return;
    if (this.#hub.merge(this)) return;
    this.isLive = true;
    this.postState();
  }

  /** Wait until all readers have room. The server waits too, because nothing is read meanwhile. */
  async #room() {
    const deadline = Date.now() + SLOW_READER_MS;
    const { signal } = this.#abort;
    while (!signal.aborted && [...this.readers].some((reader) => !reader.hasRoom)) {
      const left = deadline - Date.now();
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
  #removeForEpoch(reader, message) {
    reader.connection = null;
    this.remove(reader);
    reader.postNews({ name: "EpochChanged", message });
  }
}
