// The package `eventsource`.
import { createRequire } from 'node:module'

import { listen } from './say.mjs'

const require = createRequire(process.env.SSE_LABELS_NODE + '/')
const { EventSource } = require('eventsource')
listen(new EventSource(process.env.URL))
