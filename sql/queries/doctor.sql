-- What `sse-labels doctor` looks at. All of it reads, but for a NOTIFY, which says nothing new.

-- name: server_facts
-- One row: version as text; seconds since 1970 by its clock; does a commit wait for the disk in
-- this role's other sessions.
SELECT current_setting('server_version'),
       extract(epoch FROM clock_timestamp())::float8,
       (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit');

-- name: connections_left
-- One row: connections that this role may still open here; most connections of the server; those
-- of this program.
SELECT least(current_setting('max_connections')::integer
                 - current_setting('superuser_reserved_connections')::integer
                 - coalesce(current_setting('reserved_connections', true), '0')::integer
                 - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
             -- A limit of -1 is none, and least() does not look at nulls.
             nullif(rolconnlimit, -1)
                 - (SELECT count(*) FROM pg_stat_activity WHERE usename = rolname),
             (SELECT nullif(datconnlimit, -1)
                         - (SELECT count(*) FROM pg_stat_activity WHERE pg_stat_activity.datname
                                = pg_database.datname)
                FROM pg_database WHERE datname = current_database())),
       current_setting('max_connections')::integer,
       (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sse-labels')
  FROM pg_roles WHERE rolname = current_user;

-- name: role_facts
-- One row: is this role a superuser; may its transactions write; may it alter the label table (it
-- owns it, or is a superuser); does a row security policy hide rows from it.
SELECT rolsuper,
       current_setting('default_transaction_read_only') = 'off',
       pg_has_role(relowner, 'USAGE'),
       row_security_active(pg_class.oid)
  FROM pg_roles LEFT JOIN pg_class ON pg_class.oid = to_regclass('label')
 WHERE rolname = current_user;

-- name: rights
-- Rows (task, right, object, held): each right of the README's table, and what no task needs.
SELECT task, needed, object,
       CASE WHEN kind = 'sequence' THEN has_sequence_privilege(object, needed)
            WHEN kind = 'schema' THEN has_schema_privilege(object, needed)
            ELSE has_table_privilege(to_regclass(object), needed) END IS TRUE AS held
  FROM (SELECT CASE WHEN to_regclass('label') IS NOT NULL
                    THEN pg_get_serial_sequence('label', 'id') END AS sequence) AS id
 CROSS JOIN LATERAL
       (VALUES ('stream', 'SELECT', 'label', 'table'),
               ('stream', 'SELECT', 'label_stream', 'table'),
               ('stream', 'SELECT', sequence, 'sequence'),
               ('publish', 'INSERT', 'label', 'table'),
               ('publish', 'USAGE', sequence, 'sequence'),
               ('publish', 'SELECT', 'label_request', 'table'),
               ('publish', 'INSERT', 'label_request', 'table'),
               ('publish', 'UPDATE', 'label_request', 'table'),
               ('publish', 'DELETE', 'label_request', 'table'),
               ('sign', 'SELECT', 'label_own_source', 'table'),
               ('sign', 'INSERT', 'label_own_source', 'table'),
               ('delete old labels', 'DELETE', 'label', 'table'),
               ('delete old labels', 'UPDATE', 'label_stream', 'table'),
               ('delete old labels', 'SELECT', 'label_clock', 'table'),
               ('delete old labels', 'INSERT', 'label_clock', 'table'),
               ('delete old labels', 'DELETE', 'label_clock', 'table'),
               ('migrate', 'CREATE', current_schema(), 'schema'),
               ('nothing', 'UPDATE', 'label', 'table'),
               ('nothing', 'TRUNCATE', 'label', 'table')) AS wanted (task, needed, object, kind);

-- name: may_see_upstreams
-- One row: may this role read what is mirrored.
SELECT has_table_privilege(to_regclass('label_upstream'), 'SELECT') IS TRUE;

-- name: upstreams
-- Rows (upstream as it is named, cursor, seconds since labels came, is it followed now, labels set
-- aside) of what is mirrored. The lock's two keys are classid and objid of pg_locks.
SELECT CASE WHEN source = '' THEN url ELSE source || '=' || url END AS name, cursor,
       extract(epoch FROM clock_timestamp() - at)::float8,
       EXISTS (SELECT FROM pg_locks
                WHERE locktype = 'advisory' AND granted AND objsubid = 2
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND classid = (hashtext('sse-labels mirror')::bigint & 4294967295)::oid
                  AND objid = (hashtext(source || ' ' || url)::bigint & 4294967295)::oid),
       set_aside
  FROM label_upstream
 ORDER BY name;

-- name: triggers
-- Rows (function, is it enabled in ordinary sessions) of the label table.
SELECT proname, tgenabled IN ('O', 'A')
  FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
 WHERE tgrelid = to_regclass('label') AND NOT tgisinternal;

-- name: sequence_facts
-- One row: name; step; largest number; does it start anew after that; the last number it gave
-- (null: none yet, or not to be read); the newest seq in the table.
SELECT name, seqincrement, seqmax, seqcycle,
       CASE WHEN has_sequence_privilege(name, 'SELECT')
            THEN pg_sequence_last_value(name::regclass) END,
       (SELECT coalesce(max(id), 0) FROM label)
  FROM (SELECT pg_get_serial_sequence('label', 'id') AS name) AS sequence
  JOIN pg_sequence ON seqrelid = name::regclass;

-- name: holders_described
-- Rows (virtual transaction, who, seconds since it began or null): who took an id and has not
-- ended, prepared transactions included. Of other roles' sessions the age shows only to members
-- of pg_read_all_stats.
SELECT DISTINCT holder.virtualtransaction,
       CASE WHEN holder.pid IS NULL THEN 'prepared transaction ' || coalesce(quote_literal(gid), '?')
            ELSE 'session ' || holder.pid || coalesce(' of ' || usename, '')
                 || coalesce(', ' || state, '') END,
       extract(epoch FROM clock_timestamp() - coalesce(prepared, xact_start))::float8
  FROM pg_locks AS holder
  LEFT JOIN pg_stat_activity AS session ON session.pid = holder.pid
  LEFT JOIN pg_locks AS own
    ON own.virtualtransaction = holder.virtualtransaction AND own.locktype = 'transactionid'
   AND holder.pid IS NULL
  LEFT JOIN pg_prepared_xacts AS made ON made.transaction = own.transactionid
 WHERE holder.locktype = 'relation'
   AND holder.granted
   AND holder.mode = 'RowExclusiveLock'
   AND holder.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND holder.relation = pg_get_serial_sequence('label', 'id')::regclass;

-- name: notify
-- Nothing; servers that listen look at the table once more, and find nothing new.
NOTIFY label_channel;
