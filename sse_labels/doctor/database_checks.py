"""Checks of the database: schema, rights, sequence, triggers, notifications, durability, clock.

Promises: no check writes, and no check waits for a transaction of another program.
"""

from __future__ import annotations

import asyncio
import time

from sse_labels.app import database_connections
from sse_labels.config import Settings
from sse_labels.database.pool import Database
from sse_labels.database.queries import migrations
from sse_labels.database.schema import Schema
from sse_labels.doctor.findings import (
    Checks,
    Finding,
    Findings,
    failure,
    ok,
    problems,
    unchecked,
    warning,
)
from sse_labels.errors import DatabaseRefused, SchemaError

#: How long a notification may take; usually milliseconds.
NOTIFY_SECONDS = 3.0
#: A transaction that holds labels back for so long is reported.
HOLD_SECONDS = 2.0
#: Clocks with a larger difference are reported.
CLOCK_WARN_SECONDS = 2.0
#: With a larger difference tokens are refused (`web.auth` allows this much).
CLOCK_FAIL_SECONDS = 10.0
#: A sequence that has used this part of its numbers is reported.
SEQUENCE_FULL = 0.8
#: The trigger functions of the migrations, and the effect when one is missing.
TRIGGERS = {
    "label_notify": "labels are found by polling alone, up to --poll-seconds later",
    "label_refuse_change": "what consumers have read can be changed unnoticed",
    "label_note_source": "mirrors may take labels of sources that are published here",
    "label_refuse_delete": "labels that consumers have not read can be deleted silently",
}


class DatabaseChecks:
    """Checks one database with the settings of its server."""

    def __init__(self, database: Database, settings: Settings, *, embedded: bool) -> None:
        self._database = database
        self._settings = settings
        self._embedded = embedded

    def checks(self) -> Checks:
        """Return all checks, by subject."""
        return {
            "connection": self._connection,
            "schema": self._schema,
            "rights": self._rights,
            "sequence": self._sequence,
            "triggers": self._triggers,
            "notifications": self._notifications,
            "open transactions": self._open_transactions,
            "upstreams": self._upstreams,
            "connections left": self._connections_left,
            "durability": self._durability,
            "database's clock": self._clock,
        }

    async def _connection(self) -> Findings:
        began = time.monotonic()
        [(version, *_)] = await self._database.fetch("server_facts")
        took = 1000 * (time.monotonic() - began)
        return ok(f"PostgreSQL {version} answers, a primary ({took:.0f} ms)")

    async def _schema(self) -> Findings:
        schema = Schema(self._database, self._settings.source)
        try:
            await schema.find_source()
            await schema.check()
        except SchemaError as error:
            return failure(str(error), "see the message; `sse-labels migrate` makes the table")
        [(is_ozone, is_own)] = await self._database.fetch("is_ozone")
        if is_ozone:
            return ok("Ozone's: it is read, and never written")
        if not is_own:
            return warning(
                "the table label is there, and none of what sse-labels keeps beside it: no "
                "floor, no epoch, no publishing",
                "run `sse-labels migrate` on a database of its own, or serve --no-migrate",
            )
        try:
            [(version,)] = await self._database.fetch("schema_version")
        except DatabaseRefused as error:
            return unchecked(
                f"this role may not read which migrations were applied ({error})",
                "GRANT SELECT ON sse_labels_migration, or ask as the owner",
            )
        newest = migrations()[-1].number
        seen = f"version {version}, this program has {newest}"
        if version < newest:
            return failure(seen, "run `sse-labels migrate` as the owner")
        if version > newest:
            return failure(seen, "run a newer sse-labels: this one cannot serve it")
        return ok(f"version {version}")

    async def _rights(self) -> Findings:
        """Check that the role has the rights of its tasks, and no others."""
        settings = self._settings
        deletes = settings.retention_max_age_seconds or settings.retention_max_labels
        publishes = settings.publish_token or settings.publish_tokens_file or self._embedded
        is_wanted = {
            "stream": True,
            "publish": publishes,
            "sign": settings.signing_did,
            "delete old labels": deletes,
        }
        tasks = [task for task, wanted in is_wanted.items() if wanted]
        lacking: dict[str, list[str]] = {task: [] for task in tasks}
        spare = []
        is_ozone = await self._is_ozone()
        for task, right, place, held in await self._database.fetch("rights"):
            # Ozone has no other table of sse-labels, and its sequence need not be read.
            needed = task in tasks and not (is_ozone and task == "stream" and place != "label")
            if needed and not held:
                lacking[task].append(f"{right} on {place}")
            # The rights to migrate are not reported: the owner migrates once.
            elif held and task not in (*tasks, "migrate"):
                spare.append(f"{right} on {place}")
        [(superuser, may_write, owner, hidden)] = await self._database.fetch("role_facts")
        return problems(
            hidden
            and failure(
                "row level security hides labels from this role: they would be skipped",
                "say ALTER TABLE label DISABLE ROW LEVEL SECURITY, or give the role BYPASSRLS",
            ),
            *(
                failure(
                    f"to {task}, the role lacks {', '.join(rights)}",
                    "; ".join(f"GRANT {each} TO the role" for each in rights),
                )
                for task, rights in lacking.items()
                if rights
            ),
            (publishes or deletes)
            and not may_write
            and failure(
                "default_transaction_read_only is on: nothing can be published or deleted",
                "find out why it was set (a provider sets it when the disk is full); then say "
                "ALTER ROLE … RESET default_transaction_read_only, or ALTER DATABASE …",
            ),
            superuser
            and not self._embedded
            and warning(
                "the role is a superuser: a fault of the server could damage the whole cluster",
                "give it a role of its own; the README's table says what it needs",
            ),
            spare
            and not (owner or settings.migrate)
            and warning(
                f"the role also has {', '.join(spare)}, which nothing set here needs",
                "; ".join(f"REVOKE {each} FROM the role" for each in spare),
            ),
        ) or ok(f"enough to {' and '.join(tasks)}")

    async def _sequence(self) -> Findings:
        """Check that ids rise as the settled rule needs them. `schema` checks the cache."""
        rows = await self._database.fetch("sequence_facts")
        if not rows:
            return unchecked("label.id has no sequence")
        [(name, step, largest, cycles, last, newest)] = rows
        reached = last or newest
        why = "ids must rise" if step < 0 else "each step leaves a hole, and labels wait for it"
        return problems(
            cycles
            and failure(f"{name} starts anew at its end", f"say ALTER SEQUENCE {name} NO CYCLE"),
            step != 1
            and failure(
                f"{name} goes by steps of {step}: {why}", f"say ALTER SEQUENCE {name} INCREMENT 1"
            ),
            last is not None
            and last < newest
            and failure(
                f"{name} stands at {last}, and the table has {newest}: consumers would skip new "
                "labels, whose seqs are below their cursors",
                f"stop all writers and servers, then sse-labels reseed --above {newest}",
            ),
            reached > SEQUENCE_FULL * largest
            and warning(
                f"{name} stands at {reached} of {largest}",
                f"say ALTER SEQUENCE {name} AS bigint, and make label.id bigint",
            ),
            last is None
            and newest
            and unchecked(
                f"whether {name} stands below the newest label: this role may not read it",
                f"GRANT SELECT ON SEQUENCE {name} TO the role",
            ),
        ) or ok(f"{name} stands at {last or 0}, the table at {newest}")

    async def _triggers(self) -> Findings:
        if await self._is_ozone():
            return ok("Ozone needs none: it notifies and guards its table by itself")
        works = dict(await self._database.fetch("triggers"))
        found = []
        for function, without in TRIGGERS.items():
            if function not in works:
                made = f"TRIGGER {function} "
                [file] = [f"{m.number:04}_{m.name}.sql" for m in migrations() if made in m.sql]
                do = f"make it as sql/migrations/{file} does"
                found.append(warning(f"{function} is missing: {without}", do))
            elif not works[function]:
                do = f"say ALTER TABLE label ENABLE TRIGGER {function}"
                found.append(warning(f"{function} is switched off: {without}", do))
        return found or ok(f"{', '.join(TRIGGERS)} are on")

    async def _notifications(self) -> Findings:
        """Check that a NOTIFY of one session reaches another session."""
        connection = await self._database.connect()
        try:
            await connection.fetch("listen")
            # Take earlier notifications away, so that the next one is the answer.
            await connection.notified(0.01)
            began = time.monotonic()
            await self._database.fetch("notify")
            arrived = await connection.notified(NOTIFY_SECONDS)
            took = 1000 * (time.monotonic() - began)
        finally:
            connection.close()
        if arrived:
            return ok(f"arrive ({took:.0f} ms)")
        return failure(
            f"none arrived within {NOTIFY_SECONDS:g} s: a connection pooler that pools by "
            "transaction is between",
            "let --dsn name the database itself: LISTEN needs a session of its own",
        )

    async def _open_transactions(self) -> Findings:
        """Find transactions that hold labels back for more than HOLD_SECONDS."""
        before = {name for name, *_ in await self._database.fetch("holders_described")}
        if before:
            await asyncio.sleep(HOLD_SECONDS)
        found = []
        for name, who, age in await self._database.fetch("holders_described"):
            # Looked up twice, because the age of other roles' transactions is hidden.
            if name in before:
                long = f"for {age:.0f} s" if age is not None else f"for at least {HOLD_SECONDS:g} s"
                found.append(
                    warning(
                        f"{who} has taken an id and not ended {long}: labels after it wait",
                        "commit it or roll it back; for sessions that forget to, set "
                        "idle_in_transaction_session_timeout",
                    )
                )
        return found or ok("none holds labels back")

    async def _upstreams(self) -> Findings:
        """Check that a mirror follows each upstream."""
        if await self._is_ozone():
            return ok("nothing is mirrored into Ozone's table")
        [(may_see,)] = await self._database.fetch("may_see_upstreams")
        if not may_see:
            return ok("this role may not read label_upstream, and needs not to serve")
        found = []
        for url, cursor, age, followed, aside in await self._database.fetch("upstreams"):
            seen = f"{url} was read up to its seq {cursor}, most recently {age:.0f} s ago"
            if not cursor:
                seen = f"nothing was ever read from {url}"
            if not followed:
                do = f"run sse-labels mirror {url}, or DELETE it FROM label_upstream"
                found.append(warning(f"{seen}; nobody follows it", do))
            elif aside:
                do = "see label_set_aside for the reasons; it has the newest of them"
                found.append(warning(f"{seen}; {aside} labels were set aside", do))
            else:
                found.append(ok(seen))
        return found or ok("no labeler is mirrored here")

    async def _connections_left(self) -> Findings:
        """Check that enough connections are free for a server with these settings."""
        [(room, most, ours)] = await self._database.fetch("connections_left")
        needed = database_connections(self._settings)
        # One session of sse-labels is the doctor's. The others are of servers that run already.
        others = max(0, ours - 1)
        seen = f"{room} of {most} are free, a server needs up to {needed}, {others} are servers'"
        if room + others >= needed:
            return ok(seen)
        return failure(
            seen,
            "raise max_connections (or the limit of the role or the database), or serve with "
            "fewer --workers or --backfill-max-reads",
        )

    async def _durability(self) -> Findings:
        """Check that a crash of PostgreSQL cannot lose labels that were streamed."""
        [(*_, synchronous_commit)] = await self._database.fetch("server_facts")
        if synchronous_commit != "off":
            return ok(f"synchronous_commit is {synchronous_commit}")
        return warning(
            "synchronous_commit is off: after a crash PostgreSQL may have forgotten labels that "
            "consumers have read",
            "set synchronous_commit to on for all roles that write labels",
        )

    async def _clock(self) -> Findings:
        before = time.time()
        [(_, theirs, _)] = await self._database.fetch("server_facts")
        after = time.time()
        return clock_finding(theirs - (before + after) / 2, (after - before) / 2)

    async def _is_ozone(self) -> bool:
        [(is_ozone, _)] = await self._database.fetch("is_ozone")
        return bool(is_ozone)


def clock_finding(ahead_seconds: float, precision_seconds: float, subject: str = "") -> Finding:
    """Return the finding about a clock that is `ahead_seconds` ahead of this machine's."""
    apart = abs(ahead_seconds)
    certain = apart - precision_seconds
    seen = f"{apart:.1f} s {'ahead of' if ahead_seconds > 0 else 'behind'} this machine's"
    do = "let both machines keep time by NTP (`timedatectl`)"
    if certain > CLOCK_FAIL_SECONDS:
        return failure(f"{seen}: tokens are refused, or accepted too long", do, subject)
    if certain > CLOCK_WARN_SECONDS:
        return warning(f"{seen}: ages of labels and tokens are wrong by as much", do, subject)
    return ok(f"within {max(apart, precision_seconds):.1f} s of this machine's", subject=subject)
