// @ts-check
/**
 * The hub: all readers of a stream in one browser, and the connections that they share.
 *
 * Promises: all readers share one connection, and a second one while some of them read history. A
 * page that is closed or asleep does not delay the others. If the hub has removed a sleeping page,
 * the page gets the message `gone` when it wakes.
 * This file runs as a SharedWorker, or inside the page when there is no SharedWorker.
 * Does not belong here: HTTP (`connection.js`), the events of a page (`../labels.js`).
 */

import { Backoff } from "./backoff.js";
import { Connection } from "./connection.js";
import { filterOf, matches } from "./filter.js";
import { Health } from "./health.js";

/** @typedef {import("../labels.js").LabelEvent} LabelEvent */
/** @typedef {import("../labels.js").Filter} Filter */
/** @typedef {import("../labels.js").News} News */
/** @typedef {import("../labels.js").State} State */

/** The name of the worker. It contains the version of the messages between worker and page. */
export const WORKER_NAME = "sse_labels 2";
/** The most events that a page may have received and not read. Above this the hub waits. */
const WAITING_MAX = 5000;
/** How often the hub checks that a page is alive, and how long a page may take to answer. */
const BEAT_MS = 10_000;
const GONE_MS = 60_000;
/** How often a page gets its position while its filter hides all events. */
const POSITION_MS = 500;

/** All readers of one stream in this browser, and the connections that they share. */
export class Hub {
  /** @type {Set<Reader>} */ readers = new Set();
  backoff = new Backoff();
  /** Readers whose page is too slow. They are attached again when they have read.
   * @type {Set<Reader>} */
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
    this.health = new Health(url, () => this.postStates());
  }

  /** @param {Reader} reader */
  enter(reader) {
    this.readers.add(reader);
    this.#timer ??= setInterval(() => this.#beat(), BEAT_MS);
    this.attach(reader);
    this.postStates();
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
    this.postStates();
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

  /** Give the reader a connection: the live one if it fits, else one that reads history.
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
   * Merge a connection that has read history with the live one. Its readers move to the live
   * connection. If the live one is not open, the live readers move here.
   * @param {Connection} past  at its head
   * @returns {boolean}  whether a live connection exists; `past` may have to read further
   */
  merge(past) {
    const live = this.#find((connection) => connection.isLive);
    if (!live) return false;
    if (!live.isOpen) this.#moveReaders(live, past);
    else if (Number(past.position) >= Number(live.position)) this.#moveReaders(past, live);
    return true;
  }

  /** @param {Connection} from  it ends without readers @param {Connection} to */
  #moveReaders(from, to) {
    const readers = [...from.readers];
    for (const reader of readers) to.add(reader);
    for (const reader of readers) from.remove(reader);
  }

  /** @param {Reader} reader  its page is too slow, and the pages of others are not */
  leaveBehind(reader) {
    this.#detach(reader);
    this.#behind.add(reader);
    const message = "this page reads slower than labels come; it goes on when it has read them";
    reader.postState({ name: "too-slow", message, readers: this.readers.size });
  }

  /** @param {Connection} connection */
  forget(connection) {
    this.#connections.delete(connection);
    this.#watchHealth();
    for (const other of this.#connections) other.checkLive();
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
        reader.postGone();
        this.leave(reader);
      } else {
        reader.beat();
      }
    }
  }

  postStates() {
    this.#watchHealth();
    for (const connection of this.#connections) connection.postState();
  }

  #watchHealth() {
    const wanted = [...this.readers].some((reader) => reader.wantsHealth);
    this.health.watch(wanted && this.#find(({ isOpen }) => isOpen) !== undefined);
  }
}

/** One stream of a page, on the hub's side: its cursor, and the messages it has not read. */
export class Reader {
  /** @type {Required<Filter>} */ filter = filterOf({});
  /** Events up to this seq were posted. null: live only. @type {number | null} */ cursor = null;
  /** @type {string | null} */ epoch = null;
  wantsHealth = false;
  /** The number of events that were posted and not read. */
  waiting = 0;
  /** @type {Connection | null} */ connection = null;

  /** Messages that were posted and not read, oldest first.
   * @type {{number: number, events: number, at: number}[]} */
  #unread = [];
  #posted = 0;
  #positionAt = 0;
  #state = "";
  /** @type {Hub | null} */ #hub = null;

  /**
   * @param {MessagePort} port
   * @param {Map<string, Hub>} hubs  by stream; readers of the same stream share a hub
   * @param {(() => string | Promise<string>) | undefined} [token]
   */
  constructor(port, hubs, token) {
    this.port = port;
    this.port.onmessage = ({ data }) => this.#receive(data, hubs, token);
  }

  get hasRoom() {
    return this.waiting < WAITING_MAX;
  }

  /** Whether the page has not read for so long that it must be gone. */
  get isGone() {
    return this.#unread.length > 0 && Date.now() - this.#unread[0].at > GONE_MS;
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
    if (passing.length || Date.now() - this.#positionAt >= POSITION_MS) this.#giveAll(passing);
  }

  /** Post the position. The page's answer shows that it is alive. */
  beat() {
    if (this.cursor !== null) this.#giveAll([]);
  }

  /** @param {State} state */
  postState(state) {
    const text = JSON.stringify(state);
    if (text === this.#state) return;
    this.#state = text;
    this.epoch = state.epoch ?? this.epoch;
    // Before the state: a page that gets "live" already has the position.
    this.beat();
    this.#post({ type: "state", state }, 0);
  }

  /** @param {News} news */
  postNews(news) {
    this.#post({ type: "news", news }, 0);
  }

  /** Post that the hub removed the page. A sleeping page reads this when it wakes. */
  postGone() {
    this.#post({ type: "gone" }, 0);
  }

  /** @param {LabelEvent[]} events */
  #giveAll(events) {
    this.#positionAt = Date.now();
    this.#post({ type: "labels", events, position: this.cursor }, events.length);
  }

  /** @param {object} message @param {number} events */
  #post(message, events) {
    this.#posted += 1;
    this.#unread.push({ number: this.#posted, events, at: Date.now() });
    this.waiting += events;
    this.port.postMessage({ ...message, number: this.#posted });
  }

  /**
   * @param {any} message  what a LabelStream posts
   * @param {Map<string, Hub>} hubs
   * @param {(() => string | Promise<string>) | undefined} token
   */
  #receive(message, hubs, token) {
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
      while (this.#unread.length && this.#unread[0].number <= message.number) {
        this.waiting -= this.#unread.shift()?.events ?? 0;
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
