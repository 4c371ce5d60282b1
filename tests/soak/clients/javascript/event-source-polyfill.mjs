// The polyfill that comes back with `?lastEventId=` and sends no header.
import { createRequire } from 'node:module'

import { listen } from './say.mjs'

const require = createRequire(process.env.SSE_LABELS_NODE + '/')
const { EventSourcePolyfill } = require('event-source-polyfill')
listen(new EventSourcePolyfill(process.env.URL))
