// @ts-check
/**
 * The hub of a browser: all its readers of a stream, and the connections that they share.
 *
 * Promises: one connection however many read, and one more while some of them read history; a
 * page that is gone, or asleep, holds nobody up and is told when it comes back.
 * Runs in a SharedWorker, which is this file; or in the page, where there is none.
 * Does not belong here: HTTP (`connection.js`), what a page is told (`../labels.js`).
 */

import { Backoff } from "./backoff.js";
import { Connection } from "./connection.js";
import { filterOf, matches } from "./filter.js";
import { Health } from "./health.js";

/** @typedef {import("../labels.js").LabelEvent} LabelEvent */
/** @typedef {import("../labels.js").Filter} Filter */
/** @typedef {import("../labels.js").News} News */
/** @typedef {import("../labels.js").State} State */

/** Names the worker, and this version of what it and a page tell each other. */
export const WORKER_NAME = "sse_labels 2";
/** Events that a page may have before it; then it is waited for. */
const WAITING_MAX = 5000;
/** How often a page is asked whether it is still there, and how long it may owe the answer. */
const BEAT_MS = 10_000;
const GONE_MS = 60_000;
/** How often a page is told its position while its filter hides all. */
const POSITION_MS = 500;

/** All readers of one stream in this browser, and the connections that they share. */
export class Hub {
  /** @type {Set<Reader>} */ readers = new Set();
  backoff = new Backoff();
  /** Those whose page could not follow; they come back when they have read. @type {Set<Reader>} */
  #behind = new Set();
  /** @type {Set<Connection>} */ #connections = new Set();
  /** @type {ReturnType<typeof setInterval> | undefined} */ #timer;

  /**
   * @param {string} url
   * @param {RequestCredentials} credentials
   * @param {(() => string | Promise<string>) | undefined} token
   */
  constructor(url, credentials, token) {
    this.url = url;
    this.credentials = credentials;
    this.token = token;
    this.health = new Health(url, () => this.tellAll());
  }

  /** @param {Reader} reader */
  enter(reader) {
    this.readers.add(reader);
    this.#timer ??= setInterval(() => this.#beat(), BEAT_MS);
    this.attach(reader);
    this.tellAll();
  }

  /** @param {Reader} reader */
  leave(reader) {
    this.readers.delete(reader);
    this.#behind.delete(reader);
    this.#detach(reader);
    if (this.readers.size === 0) {
      clearInterval(this.#timer);
      this.#timer = undefined;
    }
    this.tellAll();
  }

  /** @param {Reader} reader */
  hasRead(reader) {
    if (this.#behind.has(reader)) {
      if (reader.waiting > WAITING_MAX / 2) return;
      this.#behind.delete(reader);
      this.attach(reader);
    } else {
      reader.connection?.readerHasRead();
    }
  }

  /** @param {Reader} reader */
  retry(reader) {
    if (reader.connection) reader.connection.retry();
    else if (this.readers.has(reader)) this.attach(reader);
  }

  /** Give the reader a connection: one that is where it is, else one of the past.
   * @param {Reader} reader
   */
  attach(reader) {
    const { cursor } = reader;
    const live = this.#find((connection) => connection.isLive);
    const past = this.#find((connection) => !connection.isLive);
    if (live && (cursor === null || (live.position !== null && cursor >= live.position))) {
      live.add(reader);
    } else if (past && cursor !== null) {
      past.add(reader);
    } else {
      const connection = new Connection(this, cursor, reader.epoch);
      this.#connections.add(connection);
      connection.add(reader);
      connection.run();
    }
  }

  /**
   * Past and live become one: readers that have caught up go over to the live connection; while
   * that one waits for its next try, its readers come here.
   * @param {Connection} past  at its head
   * @returns {boolean}  whether there is a live one still; `past` may have to come further
   */
  merge(past) {
    const live = this.#find((connection) => connection.isLive);
    if (!live) return false;
    if (!live.isOpen) this.#moveReaders(live, past);
    else if (Number(past.position) >= Number(live.position)) this.#moveReaders(past, live);
    return true;
  }

  /** @param {Connection} from  ends without them @param {Connection} to */
  #moveReaders(from, to) {
    const readers = [...from.readers];
    for (const reader of readers) to.add(reader);
    for (const reader of readers) from.remove(reader);
  }

  /** @param {Reader} reader  whose page does not follow, while others do */
  leaveBehind(reader) {
    this.#detach(reader);
    this.#behind.add(reader);
    const message = "this page reads slower than labels come; it goes on when it has read them";
    reader.tell({ name: "too-slow", message, readers: this.readers.size });
  }

  /** @param {Connection} connection */
  forget(connection) {
    this.#connections.delete(connection);
    this.#watchHealth();
    for (const other of this.#connections) other.lookWhere();
  }

  /** @param {(connection: Connection) => boolean} wanted */
  #find(wanted) {
    return [...this.#connections].find(wanted);
  }

  /** @param {Reader} reader */
  #detach(reader) {
    const { connection } = reader;
    reader.connection = null;
    connection?.remove(reader);
  }

  #beat() {
    for (const reader of [...this.readers]) {
      if (reader.isGone) {
        reader.sayGone();
        this.leave(reader);
      } else {
        reader.beat();
      }
    }
  }

  tellAll() {
    this.#watchHealth();
    for (const connection of this.#connections) connection.tellState();
  }

  #watchHealth() {
    const wanted = [...this.readers].some((reader) => reader.wantsHealth);
    this.health.watch(wanted && this.#find(({ isOpen }) => isOpen) !== undefined);
  }
}

/** A stream of a page, as the hub sees it: where it is, and what it has not read yet. */
export class Reader {
  /** @type {Required<Filter>} */ filter = filterOf({});
  /** What it has been sent up to; null: from now on. @type {number | null} */ cursor = null;
  /** @type {string | null} */ epoch = null;
  wantsHealth = false;
  /** Events that were posted and not read. */
  waiting = 0;
  /** @type {Connection | null} */ connection = null;

  /** Posted and not read, oldest first. @type {{number: number, events: number, at: number}[]} */
  #owed = [];
  #posted = 0;
  #told = 0;
  #state = "";
  /** @type {Hub | null} */ #hub = null;

  /**
   * @param {MessagePort} port
   * @param {Map<string, Hub>} hubs  to find those who read the same
   * @param {(() => string | Promise<string>) | undefined} [token]
   */
  constructor(port, hubs, token) {
    this.port = port;
    this.port.onmessage = ({ data }) => this.#hear(data, hubs, token);
  }

  get hasRoom() {
    return this.waiting < WAITING_MAX;
  }

  /** Whether it has not read for so long that it must be gone. */
  get isGone() {
    return this.#owed.length > 0 && Date.now() - this.#owed[0].at > GONE_MS;
  }

  /**
   * @param {LabelEvent[]} events  in order
   * @param {number} position
   */
  give(events, position) {
    const cursor = this.cursor ?? position;
    if (this.cursor !== null && position <= cursor) return;
    this.cursor = position;
    const { sources, values, uriPatterns } = this.filter;
    const all = sources.length + values.length + uriPatterns.length === 0;
    const passing = events.filter(
      ({ seq, labels }) =>
        seq > cursor && (all || labels.some((label) => matches(this.filter, label))),
    );
    if (passing.length || Date.now() - this.#told >= POSITION_MS) this.#giveAll(passing);
  }

  /** Tell the position, which also asks whether it is still there. */
  beat() {
    if (this.cursor !== null) this.#giveAll([]);
  }

  /** @param {State} state */
  tell(state) {
    const text = JSON.stringify(state);
    if (text === this.#state) return;
    this.#state = text;
    this.epoch = state.epoch ?? this.epoch;
    // Before the state: who is told "live" knows where that is.
    this.beat();
    this.#post({ type: "state", state }, 0);
  }

  /** @param {News} news */
  tellNews(news) {
    this.#post({ type: "news", news }, 0);
  }

  /** Tell it that it was taken for dead, if it should wake. */
  sayGone() {
    this.#post({ type: "gone" }, 0);
  }

  /** @param {LabelEvent[]} events */
  #giveAll(events) {
    this.#told = Date.now();
    this.#post({ type: "labels", events, position: this.cursor }, events.length);
  }

  /** @param {object} message @param {number} events */
  #post(message, events) {
    this.#posted += 1;
    this.#owed.push({ number: this.#posted, events, at: Date.now() });
    this.waiting += events;
    this.port.postMessage({ ...message, number: this.#posted });
  }

  /**
   * @param {any} message  what a LabelStream posts
   * @param {Map<string, Hub>} hubs
   * @param {(() => string | Promise<string>) | undefined} token
   */
  #hear(message, hubs, token) {
    if (message.type === "subscribe") {
      this.filter = message.filter;
      this.cursor = message.cursor;
      this.epoch = message.epoch;
      this.wantsHealth = message.health;
      const key = `${message.credentials} ${message.url}`;
      this.#hub = hubs.get(key) ?? new Hub(message.url, message.credentials, token);
      hubs.set(key, this.#hub);
      this.#hub.enter(this);
    } else if (message.type === "read") {
      while (this.#owed.length && this.#owed[0].number <= message.number) {
        this.waiting -= this.#owed.shift()?.events ?? 0;
      }
      this.#hub?.hasRead(this);
    } else if (message.type === "retry") {
      this.#hub?.retry(this);
    } else if (message.type === "close") {
      this.port.close();
      this.#hub?.leave(this);
    }
  }
}

// In the worker: each page that connects is a reader.
if ("SharedWorkerGlobalScope" in globalThis && self.name === WORKER_NAME) {
  /** @type {Map<string, Hub>} */
  const hubs = new Map();
  addEventListener("connect", (event) => {
    new Reader(/** @type {MessageEvent} */ (event).ports[0], hubs);
  });
}
