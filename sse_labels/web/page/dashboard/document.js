// @ts-check
/** Access to the document's elements, for all parts of the page. */

/** @param {string} id @returns {HTMLElement}  the element must exist */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element has the id ${id}`);
  return found;
}

/** @param {string} id @returns {HTMLInputElement} */
export function input(id) {
  return /** @type {HTMLInputElement} */ (byId(id));
}

/**
 * @param {string} id
 * @param {string} type
 * @param {(event: Event) => void} listener
 */
export function on(id, type, listener) {
  byId(id).addEventListener(type, listener);
}

/**
 * A new element with a text. The text is never parsed as HTML.
 * @param {string} tag
 * @param {string} className
 * @param {string} [text]
 */
export function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** @param {number} value */
export function shown(value) {
  return value.toLocaleString("en");
}
