// `@microsoft/fetch-event-source`, told that a clean end is no end, and no error is final.
import { createRequire } from 'node:module'

import { say } from './say.mjs'

// It was written for pages.
globalThis.window = globalThis
globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} }

const require = createRequire(process.env.SSE_LABELS_NODE + '/')
const { fetchEventSource } = require('@microsoft/fetch-event-source')
await fetchEventSource(process.env.URL, {
  openWhenHidden: true,
  onmessage: ({ event, data }) => say(event, data),
  onclose() {
    throw new Error('the stream ended')
  },
  onerror() {},
})
