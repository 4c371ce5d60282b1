// @ts-check
/**
 * The dashboard: connects the stream with the parts of the page.
 *
 * Does not belong here: drawing and counting (the other files of this folder), reading a stream
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

/** How often figures are drawn. The list draws itself. */
const DRAW_MS = 500;
/** The name under which the cursor is kept: see `remember` in `labels.js`. */
const REMEMBERED = "dashboard";

/** @type {LabelStream | null} */
let stream = null;
/** The seq after which the shown labels begin. @type {number | null} */
let start = null;

const detail = new Detail((name, entry) => view.narrow(name, entry, start));
const list = new List((event) => detail.show(event));
const rate = new Rate();
const byValue = new Counts(byId("by-value"), (val) => view.narrow("values", val, start));
const bySource = new Counts(byId("by-source"), (src) => view.narrow("sources", src, start));
const status = new Status();
const head = new Head();
const snippets = new Snippets();
const view = new View(open);

/** Show the stream of the view, like a reload of the page's address. */
function open() {
  stream?.close();
  for (const part of [list, byValue, bySource, rate, head]) part.clear();
  stream = new LabelStream({
    ...view.filter,
    from: view.from,
    remember: REMEMBERED,
    health: true,
  });
  stream.addEventListener("labels", (event) => take(/** @type {CustomEvent} */ (event).detail));
  stream.addEventListener("state", (event) => {
    const { detail: state } = /** @type {CustomEvent} */ (event);
    const position = stream?.position ?? null;
    start ??= position;
    status.show(state, position);
    if (state.name === "live") rate.start();
    if (state.head !== undefined) head.raise(state.head);
  });
  stream.addEventListener("news", (event) => {
    const { detail: news } = /** @type {CustomEvent} */ (event);
    status.news(news);
    if (news.name !== "EpochChanged") return;
    list.clear();
    start = null;
  });
  start = stream.position;
  status.show(stream.state, start);
  snippets.show(stream.href);
}

/** @param {{events: LabelEvent[]}} detail */
function take({ events }) {
  list.add(events);
  // History comes as fast as it can be read: its speed is not the rate of new labels.
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
  // A requested cursor is not a position until the stream is open: the server may refuse it.
  if (stream && ["live", "catching-up"].includes(stream.state.name)) head.draw(stream.position);
  if (stream) snippets.show(stream.href);
}

on("retry", "click", () => stream?.retry());
setInterval(draw, DRAW_MS);
open();
