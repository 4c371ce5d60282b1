// @ts-check
/**
 * The filter of a stream, with the same rules as the server's, and the URL of a stream.
 */

/** @typedef {import("../labels.js").Filter} Filter */
/** @typedef {import("../labels.js").Label} Label */

/** The format of a filter's entries. The server has the same rules. */
const EXPECTED = {
  sources: {
    pattern: /^did:[a-z]+:[a-zA-Z0-9._:%-]*[a-zA-Z0-9._-]$/,
    words: "a DID, such as 'did:plc:ewvi7nxzyoun6zhxrhs64oiz'",
  },
  values: { pattern: /^[^\p{C}\u2028\u2029]{1,128}$/u, words: "a label's value" },
  uriPatterns: {
    pattern: /^([a-zA-Z][a-zA-Z0-9+.-]*:\/*[!-.0-~][!-)+-~]*|[!-)+-~]*\*)$/,
    words: "a URI, or the start of one and then '*'",
  },
};
const ENTRIES_MAX = 100;

/**
 * A checked filter in its normal form. Tabs that share a connection may ask the server for more
 * than each of them wants, so the server may not see the filter of each tab. It is checked here.
 * @param {Filter} options
 * @returns {Required<Filter>}
 * @throws {TypeError} names the entry and what was expected
 */
export function filterOf({ sources = [], values = [], uriPatterns = [] }) {
  for (const [name, entries] of Object.entries({ sources, values, uriPatterns })) {
    if (!Array.isArray(entries) || entries.length > ENTRIES_MAX) {
      throw new TypeError(`${name}: expected an array of at most ${ENTRIES_MAX} entries`);
    }
    const { pattern, words } = EXPECTED[/** @type {keyof typeof EXPECTED} */ (name)];
    for (const entry of entries) {
      if (!pattern.test(entry)) throw new TypeError(`${name}: got '${entry}', expected ${words}`);
    }
  }
  // Sorted, so that equal filters are equal as JSON.
  return { sources: sorted(sources), values: sorted(values), uriPatterns: sorted(uriPatterns) };
}

/**
 * Whether a label passes, with the same rules as the server's.
 * @param {Filter} filter
 * @param {Label} label
 */
export function matches({ sources, values, uriPatterns }, { src, val, uri }) {
  if (values?.length && !values.includes(val)) return false;
  if (sources?.length && !sources.includes(src)) return false;
  if (!uriPatterns?.length) return true;
  return uriPatterns.some((pattern) =>
    pattern.endsWith("*") ? uri.startsWith(pattern.slice(0, -1)) : uri === pattern,
  );
}

/**
 * The URL of a stream.
 * @param {string | URL} url
 * @param {number | null} cursor
 * @param {string | null} epoch
 * @param {Filter | null} filter
 */
export function streamUrl(url, cursor, epoch, filter) {
  const full = new URL(url);
  if (cursor !== null) full.searchParams.set("cursor", String(cursor));
  if (cursor !== null && epoch !== null) full.searchParams.set("epoch", epoch);
  for (const [name, entries] of Object.entries(filter ?? {})) {
    for (const entry of entries) full.searchParams.append(name, entry);
  }
  return full;
}

/** The filter for a shared connection: the filter of all readers, or no filter when they differ.
 * @param {Required<Filter>[]} filters
 */
export function union(filters) {
  const [first, ...others] = filters;
  if (!first || others.some((other) => !same(first, other))) return filterOf({});
  return first;
}

/** Whether a stream with the filter `asked` contains all labels of the filter `wanted`.
 * @param {Required<Filter>} asked
 * @param {Required<Filter>} wanted
 */
export function covers(asked, wanted) {
  return same(asked, wanted) || same(asked, filterOf({}));
}

/** @param {Filter} one @param {Filter} other */
function same(one, other) {
  return JSON.stringify(one) === JSON.stringify(other);
}

/** @param {string[]} entries */
function sorted(entries) {
  return [...new Set(entries)].sort();
}
