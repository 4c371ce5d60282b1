// @ts-check
/**
 * The dashboard: wires the stream to what is on the page.
 *
 * Does not belong here: how any of it looks or counts (its neighbours), how a stream is read
 * (`../labels.js`).
 */

import { LabelStream } from "../labels.js";
import { byId, on } from "./document.js";
import { Counts } from "./counts.js";
import { Detail } from "./detail.js";
import { Head } from "./head.js";
import { List } from "./list.js";
import { Rate } from "./rate.js";
import { Snippets } from "./snippets.js";
import { Status } from "./status.js";
import { View } from "./view.js";

/** @typedef {import("../labels.js").LabelEvent} LabelEvent */

/** Figures are drawn so often at most; the list draws itself. */
const DRAW_MS = 500;
/** The name under which the cursor is kept, see `remember` in `labels.js`. */
const REMEMBERED = "dashboard";

/** @type {LabelStream | null} */
let stream = null;

const detail = new Detail((name, entry) => view.narrow(name, entry));
const list = new List((event) => detail.show(event));
const rate = new Rate();
const byValue = new Counts(byId("by-value"), (val) => view.narrow("values", val));
const bySource = new Counts(byId("by-source"), (src) => view.narrow("sources", src));
const status = new Status();
const head = new Head(status);
const snippets = new Snippets();
const view = new View(open);

/**
 * Show what the view says.
 * @param {boolean} anew  from where it says; else the same stream goes on, narrowed otherwise
 */
function open(anew) {
  const { filter } = view;
  const position = stream?.position ?? null;
  stream?.close();
  if (anew) list.clear();
  else list.keep(filter);
  byValue.clear();
  bySource.clear();
  head.clear();
  stream = new LabelStream({
    ...filter,
    from: anew || position === null ? view.from : position,
    remember: REMEMBERED,
  });
  stream.addEventListener("labels", (event) => take(/** @type {CustomEvent} */ (event).detail));
  stream.addEventListener("state", (event) => {
    const { detail: state } = /** @type {CustomEvent} */ (event);
    status.show(state, stream?.position ?? null);
    if (state.head !== undefined) head.raise(state.head);
  });
  stream.addEventListener("news", (event) => {
    const { detail: news } = /** @type {CustomEvent} */ (event);
    status.news(news);
    if (news.name === "EpochChanged") list.clear();
  });
  status.show(stream.state, position);
  snippets.show(stream.href);
}

/** @param {{events: LabelEvent[]}} detail */
function take({ events }) {
  list.add(events);
  // History comes as fast as it can be read: that is no rate of anything.
  if (stream?.state.name === "live") rate.add(events.length);
  for (const { labels } of events) {
    for (const { val, src } of labels) {
      byValue.add(val);
      bySource.add(src);
    }
  }
}

function draw() {
  if (document.visibilityState === "hidden") return;
  rate.draw();
  byValue.draw();
  bySource.draw();
  head.draw(stream?.position ?? null);
  if (stream) snippets.show(stream.href);
}

on("retry", "click", () => stream?.retry());
setInterval(draw, DRAW_MS);
open(true);
