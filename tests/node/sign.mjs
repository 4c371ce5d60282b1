// Signs each label of standard input (an array of rows of Ozone's table) with Ozone's own code and
// the key SIGNING_KEY (hex); writes the signatures as an array of hex.
import { createRequire } from 'node:module'
import { text } from 'node:stream/consumers'

const require = createRequire(process.env.SSE_LABELS_NODE + '/')
const { Secp256k1Keypair } = require('@atproto/crypto')
const inside = `${process.env.SSE_LABELS_NODE}/node_modules/@atproto/ozone/dist/mod-service/util.js`
const { formatLabel, signLabel } = require(inside)

const key = await Secp256k1Keypair.import(process.env.SIGNING_KEY)
const signatures = []
for (const row of JSON.parse(await text(process.stdin))) {
  const { sig } = await signLabel(formatLabel(row), key)
  signatures.push(Buffer.from(sig).toString('hex'))
}
console.log(JSON.stringify({ did: key.did(), signatures }))
