// The real Ozone, on the database that OZONE_DB_POSTGRES_URL names. Says its port in one line.
import { createRequire } from 'node:module'

const require = createRequire(process.env.SSE_LABELS_NODE + '/')
const { Database, OzoneService, envToCfg, envToSecrets, readEnv } = require('@atproto/ozone')

const env = readEnv()
const cfg = envToCfg(env)
const db = new Database({ url: cfg.db.postgresUrl, schema: cfg.db.postgresSchema })
await db.migrateToLatestOrThrow()
await db.close()
const ozone = await OzoneService.create(cfg, envToSecrets(env))
const server = await ozone.start()
console.log(JSON.stringify({ port: server.address().port }))
process.on('SIGTERM', () => ozone.destroy().then(() => process.exit(0)))
