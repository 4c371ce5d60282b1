// Reads subscribeLabels at URL (ws://…) from CURSOR, with the reference implementation: its
// Subscription, which reconnects and validates by the lexicon, or, as CLIENT=frames, plain `ws`
// with its Frame class. Writes each message as one line of JSON.
import { createRequire } from 'node:module'

const require = createRequire(process.env.SSE_LABELS_NODE + '/')
const METHOD = 'com.atproto.label.subscribeLabels'
const { URL: service, CLIENT } = process.env
let cursor = Number(process.env.CURSOR)

const say = (message) =>
  console.log(
    JSON.stringify(message, (_, value) =>
      value instanceof Uint8Array
        ? { $bytes: Buffer.from(value).toString('base64').replace(/=+$/, '') }
        : value?.type === 'Buffer'
          ? { $bytes: Buffer.from(value.data).toString('base64').replace(/=+$/, '') }
          : value,
    ),
  )

if (CLIENT === 'frames') {
  const { WebSocket } = require('ws')
  const { Frame } = require('@atproto/xrpc-server')
  const socket = new WebSocket(`${service}/xrpc/${METHOD}?cursor=${cursor}`)
  socket.on('message', (data) => {
    const { header, body } = Frame.fromBytes(new Uint8Array(data))
    say({ header, body })
  })
  socket.on('close', (code) => say({ closed: code }))
} else {
  const { Subscription } = require('@atproto/xrpc-server')
  const { lexicons } = require('@atproto/api')
  const subscription = new Subscription({
    service,
    method: METHOD,
    maxReconnectSeconds: 1,
    getParams: () => ({ cursor }),
    validate: (value) => lexicons.assertValidXrpcMessage(METHOD, value),
  })
  try {
    for await (const message of subscription) {
      if (message.seq !== undefined) cursor = message.seq
      say(message)
    }
    say({ ended: true })
  } catch (error) {
    say({ failed: error.name, error: error.error ?? String(error) })
  }
}
