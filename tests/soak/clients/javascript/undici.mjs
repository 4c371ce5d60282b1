// Node's own EventSource.
import { listen } from './say.mjs'

listen(new EventSource(process.env.URL))
