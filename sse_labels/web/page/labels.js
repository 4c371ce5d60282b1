// @ts-check
/**
 * `labels.js`: reads a stream of sse_labels in a page.
 *
 *     import { LabelStream } from "/labels.js";
 *     const stream = new LabelStream({ from: "left-off", values: ["spam"] });
 *     stream.addEventListener("labels", ({ detail }) => console.log(detail.events));
 *     stream.addEventListener("state", ({ detail }) => console.log(detail.name, detail.message));
 *
 * Promises: every label after the cursor that passes the filter is dispatched once and in order,
 * also after lost connections, restarts, and hidden or slow tabs. The `state` always says what the
 * stream waits for. All tabs of a browser that read one stream share one connection, and a second
 * one while some tabs read history: a browser opens only six connections to a host over HTTP/1.1.
 *
 * `EventSource` does not suffice: it hides the status and the body of a refusal, and each tab
 * would open its own connection. So `fetch` reads the stream, in a SharedWorker. Without a
 * SharedWorker (Chrome on Android, a page of another origin, a `token`) each page reads by itself,
 * and stops while it is hidden.
 *
 * From the page to the wire: LabelStream -> Hub -> Connection -> Parser (`reading/`).
 *
 * @module
 */

import { filterOf, matches, streamUrl } from "./reading/filter.js";
import { Reader, WORKER_NAME } from "./reading/hub.js";
import { Memory, isSeq } from "./reading/memory.js";

/**
 * One label, as in the lexicon `com.atproto.label.defs#label`. Absent fields are left out.
 * @typedef {object} Label
 * @property {number} [ver]
 * @property {string} src  DID of the labeler
 * @property {string} uri  the labeled record (at://…) or account (did:…)
 * @property {string} [cid]
 * @property {string} val
 * @property {boolean} [neg]  true: negates the label
 * @property {string} cts  when the label was made, RFC 3339
 * @property {string} [exp]
 * @property {{$bytes: string}} [sig]
 */
/** @typedef {{seq: number, labels: Label[]}} LabelEvent */
/**
 * Which labels pass. All three lists must match, and an empty list matches every label.
 * @typedef {object} Filter
 * @property {string[]} [sources]  DIDs
 * @property {string[]} [values]
 * @property {string[]} [uriPatterns]  whole URIs, or prefixes that end in `*`
 */
/**
 * @typedef {"connecting" | "catching-up" | "live" | "reconnecting" | "too-slow" | "refused"
 *   | "resting" | "closed"} StateName
 *
 * - `connecting`    the first connection is not open yet
 * - `catching-up`   labels of the history come
 * - `live`          labels come as they are published
 * - `reconnecting`  the connection was lost, or the server is full: the stream retries by itself
 * - `too-slow`      this page read slower than labels came; the stream continues by itself, and
 *                   nothing is lost
 * - `refused`       a retry would most likely fail; `retry()` retries anyway
 * - `resting`       the page is hidden and has its own connection: it continues when it is visible
 * - `closed`        `close()` was called
 */
/**
 * @typedef {object} State
 * @property {StateName} name
 * @property {string} message  for people, in English
 * @property {string} [error]  the server's name of the error, e.g. "TooManyConnections"
 * @property {number} [status]  HTTP status of a refusal
 * @property {number} [retryAt]  the time of the next try, as `Date.now()`
 * @property {string} [notReady]  why labels may not come although the stream is open, such as a
 *   database that is away; only with the option `health`
 * @property {number} [head]  the newest seq that the server has sent: when the connection opened,
 *   and later with the option `health`
 * @property {string} [epoch]  the epoch of the database; in another epoch a seq is another label
 * @property {number} [readers]  how many streams in this browser share the connection
 */
/** What happened to a stream that continues, such as OutdatedCursor or EpochChanged.
 * @typedef {{name: string, message: string, floor?: number}} News
 */
/** @typedef {"now" | "everything" | "left-off" | number} From */
/**
 * @typedef {object} Settings
 * @property {string | URL} [url]  of the stream; default: `stream` in the folder of this file
 * @property {From} [from]  where to start: "now", "everything" that is kept, after a seq, or
 *   "left-off": at the cursor of `remember` (without one: "now")
 * @property {string} [remember]  the name under which the cursor is kept in this browser's
 *   storage: the highest cursor of all streams with this name. The default is "default" with
 *   `from: "left-off"`; otherwise no cursor is kept
 * @property {() => string | Promise<string>} [token]  returns a token for each connection. The
 *   connection is then not shared with other tabs
 * @property {boolean} [background]  continue while the page is hidden, even when the connection
 *   is not shared
 * @property {boolean} [health]  ask the server every 5 s whether it is ready, at `health/ready`
 *   in the stream's folder, once for all tabs and while the stream is open
 * @property {RequestCredentials} [credentials]  as in `fetch`: "include" also sends cookies to
 *   other origins
 */
/** @typedef {Settings & Filter} Options */
export { filterOf, matches };

/** The file of the worker that tabs share. */
const WORKER_URL = new URL("reading/hub.js", import.meta.url);
/** How long a hidden page keeps its own connection. */
const REST_AFTER_MS = 5000;

/**
 * A stream of labels. Dispatches
 *
 * - `labels`, with `detail: {events: LabelEvent[]}`: several events at once when many come. The
 *   cursor is kept after the listeners ran: after a crash of the page the last labels may come
 *   again.
 * - `state`, with `detail: State`, whenever the state changes
 * - `news`, with `detail: News`
 */
export class LabelStream extends EventTarget {
  /** @type {State} */
  state = { name: "connecting", message: "connecting …" };
  /** Every label up to this seq was dispatched, or hidden by the filter. @type {number | null} */
  position = null;

  /** @type {URL} */ #url;
  /** @type {Filter} */ #filter;
  /** @type {Options} */ #options;
  /** @type {From} */ #from;
  /** @type {Memory | null} */ #memory;
  /** @type {string | null} */ #epoch = null;
  /** @type {MessagePort | null} */ #port = null;
  #shared = true;
  /** The hub of a connection that is not shared. It is kept while the page rests, because it holds
   * the time of the next try. @type {Map<string, import("./reading/hub.js").Hub>} */
  #hubs = new Map();
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #resting;

  /**
   * Open a stream.
   * @param {Options} [options]
   * @throws {TypeError} when an option is wrong
   */
  constructor(options = {}) {
    super();
    this.#options = options;
    this.#url = new URL(options.url ?? "stream", options.url ? location.href : import.meta.url);
    this.#filter = filterOf(options);
    this.#from = options.from ?? "now";
    const known = ["now", "everything", "left-off"];
    if (typeof this.#from === "number" ? !isSeq(this.#from) : !known.includes(this.#from)) {
      throw new TypeError(`from: got ${this.#from}, expected ${known.join(", ")}, or a seq`);
    }
    const name = options.remember ?? (this.#from === "left-off" ? "default" : null);
    this.#memory = name === null ? null : new Memory(`sse_labels ${this.#url} ${name}`);
    this.#shared = !options.token && canShare();
    if (this.#from === "everything") this.position = 0;
    else if (typeof this.#from === "number") this.position = this.#from;
    else if (this.#from === "left-off") {
      const left = this.#memory?.read();
      if (left) [this.position, this.#epoch] = [left.seq, left.epoch];
    }
    addEventListener("pagehide", this.#onPageHide);
    addEventListener("pageshow", this.#onPageShow);
    document.addEventListener("visibilitychange", this.#onVisibility);
    this.#subscribe();
  }

  /** The URL of the same stream from the current position, for readers without this file. */
  get href() {
    return String(streamUrl(this.#url, this.position, null, this.#filter));
  }

  /** Retry now, because a person wants it, but not sooner than 0.5 s after the last try. */
  retry() {
    if (this.state.name === "closed") return;
    if (this.#port) this.#port.postMessage({ type: "retry" });
    else this.#subscribe();
  }

  /** End the stream. No event is dispatched after that. */
  close() {
    this.#unsubscribe();
    removeEventListener("pagehide", this.#onPageHide);
    removeEventListener("pageshow", this.#onPageShow);
    document.removeEventListener("visibilitychange", this.#onVisibility);
    this.#memory?.write();
    this.state = { name: "closed", message: "closed" };
  }

  #subscribe() {
    if (this.#port) return;
    this.#port = this.#shared ? this.#sharedPort() : this.#ownPort();
    this.#port.onmessage = ({ data }) => this.#receive(data);
    this.#port.postMessage({
      type: "subscribe",
      url: String(this.#url),
      credentials: this.#options.credentials ?? "same-origin",
      cursor: this.position,
      epoch: this.#epoch,
      filter: this.#filter,
      health: this.#options.health ?? false,
    });
  }

  #unsubscribe() {
    clearTimeout(this.#resting);
    this.#port?.postMessage({ type: "close" });
    if (this.#port) this.#port.onmessage = null;
    this.#port = null;
  }

  #sharedPort() {
    const worker = new SharedWorker(WORKER_URL, { type: "module", name: WORKER_NAME });
    // The file did not load, or the browser does not support modules in workers.
    worker.onerror = () => {
      this.#unsubscribe();
      this.#shared = false;
      if (this.state.name !== "closed") this.#subscribe();
    };
    return worker.port;
  }

  #ownPort() {
    const { port1, port2 } = new MessageChannel();
    new Reader(port2, this.#hubs, this.#options.token);
    return port1;
  }

  /** @param {any} message  what the hub posts */
  #receive(message) {
    const port = this.#port;
    if (message.type === "labels") {
      if (message.events.length) this.#dispatch("labels", { events: message.events });
      this.#moveTo(message.position);
    } else if (message.type === "state") {
      this.#epoch = message.state.epoch ?? this.#epoch;
      this.#setState(message.state);
    } else if (message.type === "news") {
      if (message.news.name === "EpochChanged") this.#startAgain();
      this.#dispatch("news", message.news);
    } else if (message.type === "gone") {
      // The page was asleep, and the hub removed it.
      this.#unsubscribe();
      this.#subscribe();
    }
    port?.postMessage({ type: "read", number: message.number });
  }

  /** Start again after the epoch changed: the known seqs are other labels now. */
  #startAgain() {
    this.#unsubscribe();
    this.#memory?.forget();
    this.#epoch = null;
    this.position = this.#from === "everything" ? 0 : null;
    this.#subscribe();
  }

  /** @param {number} position */
  #moveTo(position) {
    this.position = position;
    if (this.#memory && this.#epoch !== null) this.#memory.keep(this.#epoch, position);
  }

  /** @param {State} state */
  #setState(state) {
    this.state = state;
    this.#dispatch("state", state);
  }

  /** @param {string} type @param {object} detail */
  #dispatch(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #onPageHide = () => {
    this.#memory?.write();
    this.#unsubscribe();
  };

  /** @param {PageTransitionEvent} event */
  #onPageShow = (event) => {
    if (event.persisted) this.#subscribe();
  };

  #onVisibility = () => {
    if (this.#shared || this.#options.background) return;
    clearTimeout(this.#resting);
    if (document.visibilityState === "visible") this.#subscribe();
    else this.#resting = setTimeout(() => this.#rest(), REST_AFTER_MS);
  };

  #rest() {
    this.#unsubscribe();
    this.#memory?.write();
    const message = "the page is hidden; it goes on from here when it is seen";
    this.#setState({ name: "resting", message });
  }
}

function canShare() {
  return typeof SharedWorker === "function" && new URL(import.meta.url).origin === origin;
}
