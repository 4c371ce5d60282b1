"""Checks of the database: what the settled rule, the tasks and the wakes rest on.

Promises: each check asks on its own and says what it saw; none of them writes,
and none waits for another program's transaction. A check that finds nothing
wrong says so.
Stands beside the server: it asks what the server would ask, by the same edge.
Does not belong here: refusing to start (`Schema.check`); the way to a reader (`way_checks`).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

from sse_labels.app import database_connections
from sse_labels.config import Settings
from sse_labels.database import Database
from sse_labels.doctor.findings import Finding, failure, ok, unchecked, warning
from sse_labels.errors import DatabaseRefused, SchemaError
from sse_labels.queries import migrations
from sse_labels.schema import Schema

#: How long a notification may take; it takes milliseconds.
NOTIFY_SECONDS = 3.0
#: A transaction that holds labels back for so long is reported.
HOLD_SECONDS = 2.0
#: Clocks that are further apart are reported …
CLOCK_WARN_SECONDS = 2.0
#: … and beyond this tokens are refused (`web.auth` allows as much).
CLOCK_FAIL_SECONDS = 10.0
#: A sequence that has used so much of its numbers is reported.
SEQUENCE_FULL = 0.8
#: The trigger functions of the migrations, and what happens without each.
TRIGGERS = {
    "label_notify": "labels are found by polling alone, up to --poll-seconds later",
    "label_refuse_change": "what consumers have read can be changed behind them",
    "label_note_source": "mirrors may take labels of sources that are published here",
    "label_refuse_delete": "labels that consumers have not read can be deleted silently",
}


class DatabaseChecks:
    """Looks at one database, with the settings of the server that is to run on it."""

    def __init__(self, database: Database, settings: Settings, *, embedded: bool) -> None:
        self._database = database
        self._settings = settings
        self._embedded = embedded

    def checks(self) -> dict[str, Callable[[], Awaitable[list[Finding]]]]:
        """Return all of them by subject; the first says whether the others make sense."""
        return {
            "connection": self.connection,
            "schema": self.schema,
            "rights": self.rights,
            "sequence": self.sequence,
            "triggers": self.triggers,
            "notifications": self.notifications,
            "open transactions": self.open_transactions,
            "upstreams": self.upstreams,
            "connections left": self.connections_left,
            "durability": self.durability,
            "database's clock": self.clock,
        }

    async def connection(self) -> list[Finding]:
        """Say what answers."""
        began = time.monotonic()
        [(version, *_)] = await self._database.fetch("server_facts")
        took = 1000 * (time.monotonic() - began)
        return [ok("connection", f"PostgreSQL {version} answers, a primary ({took:.0f} ms)")]

    async def schema(self) -> list[Finding]:
        """Say whether labels can be served from these tables."""
        schema = Schema(self._database, self._settings.source)
        try:
            await schema.find_source()
            await schema.check()
        except SchemaError as error:
            return [failure("schema", str(error), "see the message; `sse-labels migrate` makes it")]
        if schema.attached:
            return [ok("schema", "Ozone's: it is read, and never written")]
        [(recorded, _)] = await self._database.fetch("schema_exists")
        if not recorded:
            return [
                warning(
                    "schema",
                    "the table label is there, and none of what sse-labels keeps beside it: no "
                    "floor, no epoch, no publishing",
                    "run `sse-labels migrate` on a database of its own, or serve --no-migrate",
                )
            ]
        newest = migrations()[-1].number
        try:
            [(version,)] = await self._database.fetch("schema_version")
        except DatabaseRefused as error:
            return [
                unchecked(
                    "schema",
                    f"this role may not read which migrations were applied ({error})",
                    "GRANT SELECT ON sse_labels_migration, or ask as the owner",
                )
            ]
        if version != newest:
            do = "run `sse-labels migrate` as the owner"
            if version > newest:
                do = "run a newer sse-labels: this one cannot serve it"
            return [failure("schema", f"version {version}, this program has {newest}", do)]
        return [ok("schema", f"version {version}")]

    async def _is_ozone(self) -> bool:
        [(is_ozone, _)] = await self._database.fetch("is_ozone")
        return bool(is_ozone)

    async def rights(self) -> list[Finding]:
        """Say what the role may do, too little and too much."""
        # Who may migrate is no question here: the owner, once.
        held = [row for row in await self._database.fetch("rights") if row[0] != "migrate"]
        if await self._is_ozone():
            # It has none of our tables, and its sequence need not be read.
            held = [row for row in held if row[0] != "stream" or row[2] == "label"]
        [(owner, hidden)] = await self._database.fetch("label_owner") or [(False, False)]
        [facts] = await self._database.fetch("server_facts")
        superuser, may_write = facts[10], facts[12]
        settings = self._settings
        deletes = settings.retention_max_age_seconds or settings.retention_max_labels
        publishes = settings.publish_token or settings.publish_tokens_file or self._embedded
        tasks = {
            "stream": True,
            "publish": publishes,
            "sign": settings.signing_did,
            "delete old labels": deletes,
        }
        found = []
        if hidden:
            found.append(
                failure(
                    "rights",
                    "row level security hides labels from this role: they would be skipped",
                    "say ALTER TABLE label DISABLE ROW LEVEL SECURITY, or give the role BYPASSRLS",
                )
            )
        for task, wanted in tasks.items():
            missing = [
                f"{right} on {place}" for of, right, place, may in held if of == task and not may
            ]
            if wanted and missing:
                found.append(
                    failure(
                        "rights",
                        f"to {task}, the role lacks {', '.join(missing)}",
                        "; ".join(f"GRANT {each} TO the role" for each in missing),
                    )
                )
        if (publishes or deletes) and not may_write:
            found.append(
                failure(
                    "rights",
                    "default_transaction_read_only is on: nothing can be published or deleted",
                    "find out who set it (a provider does, when the disk is full); then say ALTER "
                    "ROLE … RESET default_transaction_read_only, or ALTER DATABASE …",
                )
            )
        if superuser and not self._embedded:
            found.append(
                warning(
                    "rights",
                    "the role is a superuser: a fault here could do anything to the cluster",
                    "give it a role of its own; the README's table says what it needs",
                )
            )
        elif not settings.migrate and not owner:
            spare = [
                f"{right} on {place}" for of, right, place, may in held if not tasks.get(of) and may
            ]
            if spare:
                found.append(
                    warning(
                        "rights",
                        f"the role also has {', '.join(spare)}, which nothing set here needs",
                        "; ".join(f"REVOKE {each} FROM the role" for each in spare),
                    )
                )
        able = " and ".join(task for task, wanted in tasks.items() if wanted)
        return found or [ok("rights", f"enough to {able}")]

    async def sequence(self) -> list[Finding]:
        """Say whether ids come as the settled rule needs them; its cache is `schema`'s."""
        rows = await self._database.fetch("sequence_facts")
        if not rows:
            return [unchecked("sequence", "label.id has none")]
        [(name, step, largest, cycles, last, newest)] = rows
        found = []
        if cycles:
            found.append(
                failure(
                    "sequence",
                    f"{name} starts anew at its end",
                    f"say ALTER SEQUENCE {name} NO CYCLE",
                )
            )
        if step != 1:
            found.append(
                failure(
                    "sequence",
                    f"{name} goes by steps of {step}: "
                    + ("ids must rise" if step < 0 else "each step is a hole to be waited for"),
                    f"say ALTER SEQUENCE {name} INCREMENT 1",
                )
            )
        if last is not None and last < newest:
            found.append(
                failure(
                    "sequence",
                    f"{name} stands at {last}, and the table has {newest}: new labels would come "
                    "below what consumers have read, and be skipped",
                    f"stop what writes and serves, then sse-labels reseed --above {newest}",
                )
            )
        if (last or newest) > SEQUENCE_FULL * largest:
            found.append(
                warning(
                    "sequence",
                    f"{name} stands at {last or newest} of {largest}",
                    f"say ALTER SEQUENCE {name} AS bigint, and make label.id bigint",
                )
            )
        if last is None and newest:
            found.append(
                unchecked(
                    "sequence",
                    f"whether {name} stands below the newest label: this role may not read it",
                    f"GRANT SELECT ON SEQUENCE {name} TO the role",
                )
            )
        return found or [ok("sequence", f"{name} stands at {last or 0}, the table at {newest}")]

    async def triggers(self) -> list[Finding]:
        """Say whether the triggers of the migrations are there and fire."""
        if await self._is_ozone():
            return [ok("triggers", "Ozone has none: it notifies, and guards its table, itself")]
        works = {
            function: enabled for _, function, enabled in await self._database.fetch("triggers")
        }
        found = []
        made_by = {
            function: f"{step.number:04}_{step.name}.sql"
            for step in migrations()
            for function in TRIGGERS
            if re.search(rf"TRIGGER {function}\s", step.sql)
        }
        for function, without in TRIGGERS.items():
            if not works.get(function):
                state = "is switched off" if function in works else "is missing"
                found.append(
                    warning(
                        "triggers",
                        f"{function} {state}: {without}",
                        f"say ALTER TABLE label ENABLE TRIGGER {function}"
                        if function in works
                        else f"make it as sql/migrations/{made_by[function]} does",
                    )
                )
        return found or [ok("triggers", f"{', '.join(TRIGGERS)} are on")]

    async def notifications(self) -> list[Finding]:
        """Say whether a NOTIFY of one session reaches another one."""
        connection = await self._database.connect()
        try:
            await connection.fetch("listen")
            # Whatever came before is taken away, so that what comes now is an answer.
            await connection.notified(0.01)
            began = time.monotonic()
            await self._database.fetch("notify")
            arrived = await connection.notified(NOTIFY_SECONDS)
            took = 1000 * (time.monotonic() - began)
        finally:
            connection.close()
        if arrived:
            return [ok("notifications", f"arrive ({took:.0f} ms)")]
        return [
            failure(
                "notifications",
                f"none arrived within {NOTIFY_SECONDS:g} s: a connection pooler that pools by "
                "transaction stands before the database",
                "give --dsn the database itself: LISTEN needs a session of its own",
            )
        ]

    async def open_transactions(self) -> list[Finding]:
        """Say who keeps labels from being settled, for longer than a moment."""
        before = {name for name, *_ in await self._database.fetch("holders_described")}
        if before:
            await asyncio.sleep(HOLD_SECONDS)
        # By its two looks, because the age of other roles' transactions does not show.
        stayed = [
            (who, age)
            for name, who, age in await self._database.fetch("holders_described")
            if name in before
        ]
        if not stayed:
            return [ok("open transactions", "none holds labels back")]
        found = []
        for who, age in stayed:
            long = f"for {age:.0f} s" if age is not None else f"for at least {HOLD_SECONDS:g} s"
            found.append(
                warning(
                    "open transactions",
                    f"{who} has taken an id and not ended {long}: labels after it wait",
                    "commit it or roll it back; for sessions that forget to, set "
                    "idle_in_transaction_session_timeout",
                )
            )
        return found

    async def upstreams(self) -> list[Finding]:
        """Say of each labeler that is mirrored whether somebody follows it."""
        if await self._is_ozone():
            return [ok("upstreams", "nothing is mirrored into Ozone's table")]
        [(may_see,)] = await self._database.fetch("may_see_upstreams")
        if not may_see:
            return [ok("upstreams", "not for this role to see, nor needed to serve")]
        found = []
        for url, cursor, age, followed, aside in await self._database.fetch("upstreams"):
            seen = f"{url} is taken up to its seq {cursor}, the last of it {age:.0f} s ago"
            if not cursor:
                seen = f"nothing was ever taken from {url}"
            if not followed:
                found.append(
                    warning(
                        "upstreams",
                        f"{seen}; nobody follows it",
                        f"run sse-labels mirror {url}, or DELETE it FROM label_upstream",
                    )
                )
            elif aside:
                found.append(
                    warning(
                        "upstreams",
                        f"{seen}; {aside} labels were set aside",
                        "see label_set_aside for why: it has the newest",
                    )
                )
            else:
                found.append(ok("upstreams", seen))
        return found or [ok("upstreams", "no labeler is mirrored here")]

    async def connections_left(self) -> list[Finding]:
        """Say whether a server with these settings finds connections enough."""
        [facts] = await self._database.fetch("server_facts")
        _, _, most, reserved, used, ours, of_role, of_database, by_role, by_database, *_ = facts
        needed = database_connections(self._settings)
        room = most - reserved - used
        if of_role >= 0:
            room = min(room, of_role - by_role)
        if of_database >= 0:
            room = min(room, of_database - by_database)
        # Of this program's own, some are the doctor's; the rest is a server that runs already.
        others = max(0, ours - 1)
        seen = f"{room} of {most} are free, a server needs up to {needed}, {others} are servers'"
        if room + others >= needed:
            return [ok("connections left", seen)]
        return [
            failure(
                "connections left",
                seen,
                "raise max_connections (or the limit of the role or the database), or serve with "
                "fewer --workers or --backfill-max-reads",
            )
        ]

    async def durability(self) -> list[Finding]:
        """Say whether a crash of PostgreSQL can take back what was streamed."""
        [facts] = await self._database.fetch("server_facts")
        if facts[11] == "off":
            return [
                warning(
                    "durability",
                    "synchronous_commit is off: after a crash PostgreSQL may have forgotten labels "
                    "that consumers have read",
                    "set synchronous_commit to on for whoever writes labels",
                )
            ]
        return [ok("durability", f"synchronous_commit is {facts[11]}")]

    async def clock(self) -> list[Finding]:
        """Say how far the database's clock is from this machine's."""
        before = time.time()
        [(_, theirs, *_)] = await self._database.fetch("server_facts")
        ours = (before + time.time()) / 2
        return [clock_finding("database's clock", theirs - ours, (time.time() - before) / 2)]


def clock_finding(subject: str, ahead_seconds: float, precision_seconds: float) -> Finding:
    """Return what to say of a clock that is `ahead_seconds` of this machine's."""
    way = "ahead of" if ahead_seconds > 0 else "behind"
    seen = f"{abs(ahead_seconds):.1f} s {way} this machine's"
    certain = abs(ahead_seconds) - precision_seconds
    do = "let both machines keep time by NTP (`timedatectl`)"
    if certain > CLOCK_FAIL_SECONDS:
        return failure(subject, f"{seen}: tokens are refused, or live on", do)
    if certain > CLOCK_WARN_SECONDS:
        return warning(subject, f"{seen}: ages of labels and tokens are off by as much", do)
    return ok(
        subject, f"within {max(abs(ahead_seconds), precision_seconds):.1f} s of this machine's"
    )
