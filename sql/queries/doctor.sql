-- The checks of `sse-labels doctor`. All blocks only read, except a NOTIFY, which changes nothing.

-- name: server_facts
-- One row: the version as text; seconds since 1970 by the server's clock; synchronous_commit of
-- this role's other sessions, which says whether a commit waits for the disk.
SELECT current_setting('server_version'),
       extract(epoch FROM clock_timestamp())::float8,
       (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit');

-- name: connections_left
-- One row: the number of connections that this role may still open here; the server's maximum; the
-- connections of this program.
SELECT least(current_setting('max_connections')::integer
                 - current_setting('superuser_reserved_connections')::integer
                 - coalesce(current_setting('reserved_connections', true), '0')::integer
                 - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
             -- A limit of -1 means no limit, and least() ignores nulls.
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
-- One row: whether this role is a superuser; whether its transactions may write; whether it may
-- alter the label table (as its owner or a superuser); whether a row security policy hides rows
-- from it.
SELECT rolsuper,
       current_setting('default_transaction_read_only') = 'off',
       pg_has_role(relowner, 'USAGE'),
       row_security_active(pg_class.oid)
  FROM pg_roles LEFT JOIN pg_class ON pg_class.oid = to_regclass('label')
 WHERE rolname = current_user;

-- name: rights
-- Rows (task, right, object, held): each right of the README's table, and rights that no task
-- needs.
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
-- One row: whether this role may read the state of the mirrors.
SELECT has_table_privilege(to_regclass('label_upstream'), 'SELECT') IS TRUE;

-- name: upstreams
-- Rows (name, cursor, seconds since labels came, whether a mirror follows it now, labels set aside)
-- of all upstreams. The lock's two keys are classid and objid of pg_locks.
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
-- Rows (function, whether it is enabled in ordinary sessions) of the label table's triggers.
SELECT proname, tgenabled IN ('O', 'A')
  FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
 WHERE tgrelid = to_regclass('label') AND NOT tgisinternal;

-- name: sequence_facts
-- One row: the sequence's name; step; largest number; whether it starts again after that; its last
-- number (null: none yet, or this role may not read it); the newest seq in the table.
SELECT name, seqincrement, seqmax, seqcycle,
       CASE WHEN has_sequence_privilege(name, 'SELECT')
            THEN pg_sequence_last_value(name::regclass) END,
       (SELECT coalesce(max(id), 0) FROM label)
  FROM (SELECT pg_get_serial_sequence('label', 'id') AS name) AS sequence
  JOIN pg_sequence ON seqrelid = name::regclass;

-- name: holders_described
-- Rows (virtual transaction, description, seconds since its begin or null): open transactions that
-- took an id, prepared ones included. Only members of pg_read_all_stats see the age of other roles'
-- sessions.
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
-- Nothing; servers that listen read the table again, and find no new label.
NOTIFY label_channel;
