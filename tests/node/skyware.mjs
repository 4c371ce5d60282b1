// The real @skyware/labeler on the SQLite file of LABELS_DB. Says its port in one line; then each
// line of standard input is an array of labels to create, answered by their ids.
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

const entry = `${process.env.SSE_LABELS_NODE}/node_modules/@skyware/labeler/dist/index.js`
const { LabelerServer } = await import(pathToFileURL(entry))
const { LABELER_DID, SIGNING_KEY, LABELS_DB, PORT = '0' } = process.env
const server = new LabelerServer({ did: LABELER_DID, signingKey: SIGNING_KEY, dbPath: LABELS_DB })

server.start({ port: Number(PORT), host: '127.0.0.1' }, async (error, address) => {
  if (error) throw error
  console.log(JSON.stringify({ port: Number(new URL(address).port) }))
  for await (const line of createInterface({ input: process.stdin })) {
    const ids = []
    for (const label of JSON.parse(line)) ids.push((await server.createLabel(label)).id)
    console.log(JSON.stringify({ ids }))
  }
})
