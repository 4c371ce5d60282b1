// @ts-check
/**
 * `labels.js`: reads a stream of sse_labels in a page.
 *
 *     import { LabelStream } from "/labels.js";
 *     const stream = new LabelStream({ from: "left-off", values: ["spam"] });
 *     stream.addEventListener("labels", ({ detail }) => console.log(detail.events));
 *     stream.addEventListener("state", ({ detail }) => console.log(detail.name, detail.message));
 *
 * Promises: every label after the cursor that the filter lets through is handed over once and
 * in order, through lost connections, restarts, hidden tabs and slow ones; what it waits for is
 * always told. All tabs of a browser that read one stream share one connection, and one more
 * while some of them read history: a browser opens only six to a host over HTTP/1.1.
 *
 * `EventSource` would do neither: it hides the status and the body of a refusal, and each tab
 * would have its own. So the stream is read by `fetch`, in a SharedWorker. Where there is none
 * (Chrome on Android, a page of another origin, a `token`), the page reads for itself, and rests
 * while it is hidden.
 *
 * From the page to the wire: LabelStream -> Hub -> Connection -> Parser (`reading/`).
 *
 * @module
 */

import { filterOf, matches, streamUrl } from "./reading/filter.js";
import { Reader, WORKER_NAME } from "./reading/hub.js";
import { Memory, isSeq } from "./reading/memory.js";

/**
 * One label, as in the lexicon `com.atproto.label.defs#label`; absent fields are left out.
 * @typedef {object} Label
 * @property {number} [ver]
 * @property {string} src  DID of the labeler
 * @property {string} uri  what is labeled: a record (at://…) or an account (did:…)
 * @property {string} [cid]
 * @property {string} val
 * @property {boolean} [neg]  true: takes the label back
 * @property {string} cts  when it was made, RFC 3339
 * @property {string} [exp]
 * @property {{$bytes: string}} [sig]
 */
/** @typedef {{seq: number, labels: Label[]}} LabelEvent */
/**
 * Which labels pass: every part must agree, an empty part agrees with anything.
 * @typedef {object} Filter
 * @property {string[]} [sources]  DIDs
 * @property {string[]} [values]
 * @property {string[]} [uriPatterns]  whole URIs, or prefixes that end in `*`
 */
/**
 * @typedef {"connecting" | "catching-up" | "live" | "reconnecting" | "too-slow" | "refused"
 *   | "resting" | "closed"} StateName
 *
 * - `connecting`    for the first time
 * - `catching-up`   labels come, and there are older ones still to come
 * - `live`          labels come as they are published
 * - `reconnecting`  the connection is gone, or the server has no place: it tries again by itself
 * - `too-slow`      this page read slower than labels came; it goes on by itself, nothing is lost
 * - `refused`       trying again would not help; `retry()` tries all the same
 * - `resting`       the page is hidden and has a connection of its own: it goes on when it is seen
 * - `closed`        by `close()`
 */
/**
 * @typedef {object} State
 * @property {StateName} name
 * @property {string} message  for people, in English
 * @property {string} [error]  the server's name for what is wrong, e.g. "TooManyConnections"
 * @property {number} [status]  HTTP status of a refusal
 * @property {number} [retryAt]  when it tries again, as `Date.now()`
 * @property {string} [notReady]  the stream is open, and why labels may not come all the same,
 *   such as a database that is away; with the option `health` alone
 * @property {number} [head]  newest seq that the server has told: when the connection opened, and
 *   with the option `health`
 * @property {string} [epoch]  the database's life; seqs of another one name other labels
 * @property {number} [readers]  how many streams in this browser share the connection
 */
/** What happened to the stream although it goes on: OutdatedCursor, EpochChanged, …
 * @typedef {{name: string, message: string, floor?: number}} News
 */
/** @typedef {"now" | "everything" | "left-off" | number} From */
/**
 * @typedef {object} Settings
 * @property {string | URL} [url]  of the stream; `/stream` beside this file if not given
 * @property {From} [from]  where to start: "now", "everything" that is kept, after a seq, or where
 *   `remember` left off (else "now")
 * @property {string} [remember]  name under which the cursor is kept in this browser's storage:
 *   the furthest that any stream of this name came to. With `from: "left-off"` it is "default"
 *   if not given, otherwise nothing is kept
 * @property {() => string | Promise<string>} [token]  gives a token for each connection. The
 *   connection is then not shared with other tabs
 * @property {boolean} [background]  go on while the page is hidden, also when the connection is
 *   not shared
 * @property {boolean} [health]  ask the server every 5 s whether it is ready, at `health/ready`
 *   beside the stream, once for all tabs and while the stream is open
 * @property {RequestCredentials} [credentials]  as in `fetch`: "include" sends cookies elsewhere
 */
/** @typedef {Settings & Filter} Options */
export { filterOf, matches };

/** The worker that tabs share. */
const WORKER_URL = new URL("reading/hub.js", import.meta.url);
/** How long a hidden page keeps a connection of its own. */
const REST_AFTER_MS = 5000;

/**
 * A stream of labels. Dispatches
 *
 * - `labels`, with `detail: {events: LabelEvent[]}`: several at once when many come. Its cursor
 *   is kept after the listeners ran: labels that a page was shown last may come again if it dies
 *   in between.
 * - `state`, with `detail: State`, whenever the state changes
 * - `news`, with `detail: News`
 */
export class LabelStream extends EventTarget {
  /** @type {State} */
  state = { name: "connecting", message: "connecting …" };
  /** Every label up to here was handed over, or hidden by the filter. @type {number | null} */
  position = null;

  /** @type {URL} */ #url;
  /** @type {Filter} */ #filter;
  /** @type {Options} */ #options;
  /** @type {From} */ #from;
  /** @type {Memory | null} */ #memory;
  /** @type {string | null} */ #epoch = null;
  /** @type {MessagePort | null} */ #port = null;
  #shared = true;
  /** Of a connection that is not shared. Kept, with when the server may be asked again, while the
   * page rests. @type {Map<string, import("./reading/hub.js").Hub>} */
  #hubs = new Map();
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #resting;

  /**
   * Open a stream.
   * @param {Options} [options]
   * @throws {TypeError} when an option makes no sense
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
    addEventListener("pagehide", this.#leave);
    addEventListener("pageshow", this.#comeBack);
    document.addEventListener("visibilitychange", this.#look);
    this.#subscribe();
  }

  /** The URL that a reader without this file would use to read the same from here on. */
  get href() {
    return String(streamUrl(this.#url, this.position, null, this.#filter));
  }

  /** Try again now, because a person wants it: not sooner than 0.5 s after the last try. */
  retry() {
    if (this.state.name === "closed") return;
    if (this.#port) this.#port.postMessage({ type: "retry" });
    else this.#subscribe();
  }

  /** End the stream; nothing is dispatched any more. */
  close() {
    this.#unsubscribe();
    removeEventListener("pagehide", this.#leave);
    removeEventListener("pageshow", this.#comeBack);
    document.removeEventListener("visibilitychange", this.#look);
    this.#memory?.write();
    this.state = { name: "closed", message: "closed" };
  }

  #subscribe() {
    if (this.#port) return;
    this.#port = this.#shared ? this.#sharedPort() : this.#ownPort();
    this.#port.onmessage = ({ data }) => this.#hear(data);
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
    // The file did not load, or the browser knows no modules in workers.
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
  #hear(message) {
    const port = this.#port;
    if (message.type === "labels") {
      if (message.events.length) this.#tell("labels", { events: message.events });
      this.#moveTo(message.position);
    } else if (message.type === "state") {
      this.#epoch = message.state.epoch ?? this.#epoch;
      this.#setState(message.state);
    } else if (message.type === "news") {
      if (message.news.name === "EpochChanged") this.#startAnew();
      this.#tell("news", message.news);
    } else if (message.type === "gone") {
      // This page was taken for dead, having been asleep.
      this.#unsubscribe();
      this.#subscribe();
    }
    port?.postMessage({ type: "read", number: message.number });
  }

  /** The seqs that are known name other labels now. */
  #startAnew() {
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
    this.#tell("state", state);
  }

  /** @param {string} type @param {object} detail */
  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #leave = () => {
    this.#memory?.write();
    this.#unsubscribe();
  };

  /** @param {PageTransitionEvent} event */
  #comeBack = (event) => {
    if (event.persisted) this.#subscribe();
  };

  #look = () => {
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
