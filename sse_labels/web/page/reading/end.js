// @ts-check
/**
 * The end of a connection: after an `error` event, or after an answer that is not a stream.
 *
 * Does not belong here: reading a stream (`connection.js`), when to try again (`backoff.js`).
 */

/** How a connection ended, or did not begin.
 * @typedef {object} End
 * @property {"lost" | "too-slow" | "refused" | "epoch" | "again"} how
 * @property {string} message
 * @property {string} [error]
 * @property {number} [status]
 * @property {number} [askedMs]  how long the server asks to wait
 */

/** Errors of the stream that mean more than "reconnect". @type {Record<string, End["how"]>} */
const HOW = { ConsumerTooSlow: "too-slow", EpochChanged: "epoch" };

/** @param {unknown} reason @returns {reason is End} */
export function isEnd(reason) {
  return typeof reason === "object" && reason !== null && "how" in reason;
}

/**
 * The end of a stream with an `error` event.
 * @param {string} data  of the event
 * @returns {End}
 */
export function endOfStream(data) {
  const { error, message } = JSON.parse(data);
  return { how: HOW[error] ?? "lost", message, error };
}

/**
 * The end of a connection whose answer is not a stream.
 * @param {Response} response
 * @param {string} type
 * @returns {Promise<End>}
 */
export async function refusal(response, type) {
  const { status } = response;
  /** @type {{error?: string, message?: string}} */
  let said = {};
  try {
    said = await response.json();
  } catch {
    // The answer is not from the server, but perhaps a page of a proxy.
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

/** The wait of a `Retry-After`: seconds or a date (RFC 9110, section 10.2.3).
 * @param {string} value
 */
function retryAfterMs(value) {
  if (/^\d+$/.test(value)) return 1000 * Number(value);
  return value.endsWith("GMT") ? Math.max(0, Date.parse(value) - Date.now()) || 0 : 0;
}
