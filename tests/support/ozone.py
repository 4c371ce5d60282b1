"""The real Ozone on its own database; labels are made only by its HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from sse_labels.protocol.xrpc import Message, decode

from support.database import TestDatabase
from support.node import NEWEST, NodeProgram

OZONE_DID = "did:plc:" + "o" * 24
ADMIN_DID = "did:plc:" + "a" * 24
ADMIN_PASSWORD = "ozone-admin"
SIGNING_KEY = "1f" * 32
#: An address without a server: Ozone must need no other service.
NOWHERE = "http://127.0.0.1:9"


class Ozone:
    """One running Ozone."""

    def __init__(self, program: NodeProgram, port: int) -> None:
        self.program = program
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._session = aiohttp.ClientSession(
            headers={"Authorization": aiohttp.encode_basic_auth("admin", ADMIN_PASSWORD)}
        )

    async def emit(self, subject: dict[str, Any], kind: str, **event: Any) -> dict[str, Any]:
        """Call `tools.ozone.moderation.emitEvent`; `kind` as in `modEventLabel`."""
        body = {
            "event": {"$type": f"tools.ozone.moderation.defs#{kind}", **event},
            "subject": subject,
            "createdBy": ADMIN_DID,
        }
        url = f"{self.url}/xrpc/tools.ozone.moderation.emitEvent"
        async with self._session.post(url, json=body) as answer:
            said: dict[str, Any] = await answer.json()
            assert answer.status == 200, said
            return said

    async def label(
        self, subject: dict[str, Any], *create: str, negate: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Label a subject, and negate labels of it."""
        return await self.emit(
            subject, "modEventLabel", createLabelVals=create, negateLabelVals=negate
        )

    @asynccontextmanager
    async def subscribed(self, cursor: int | None = None) -> AsyncIterator[list[Message]]:
        """Read its subscribeLabels during the block; messages are appended to the list."""
        query = "" if cursor is None else f"?cursor={cursor}"
        url = f"{self.url}/xrpc/com.atproto.label.subscribeLabels{query}"
        received: list[Message] = []
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:

            async def read() -> None:
                while True:
                    received.append(decode(await socket.receive_bytes()))

            reading = asyncio.create_task(read())
            try:
                yield received
            finally:
                reading.cancel()

    async def close(self) -> None:
        await self._session.close()


@asynccontextmanager
async def ozone(database: TestDatabase, packages: str = NEWEST) -> AsyncIterator[Ozone]:
    """Run Ozone on an empty database, or on a database of an earlier run."""
    with ozone_program(database, packages) as program:
        running = Ozone(program, program.next()["port"])
        try:
            yield running
        finally:
            await running.close()


@contextmanager
def ozone_program(
    database: TestDatabase, packages: str = NEWEST, **environment: str
) -> Iterator[NodeProgram]:
    # Node's driver needs a host before the socket's folder.
    url = database.url().replace("@/", "@localhost/")
    settings = {
        "OZONE_DB_POSTGRES_URL": url,
        "OZONE_PORT": "0",
        "OZONE_PUBLIC_URL": NOWHERE,
        "OZONE_SERVER_DID": OZONE_DID,
        "OZONE_APPVIEW_URL": NOWHERE,
        "OZONE_APPVIEW_DID": "did:web:appview.test",
        "OZONE_DID_PLC_URL": NOWHERE,
        "OZONE_ADMIN_PASSWORD": ADMIN_PASSWORD,
        "OZONE_ADMIN_DIDS": ADMIN_DID,
        "OZONE_SIGNING_KEY_HEX": SIGNING_KEY,
        **environment,
    }
    with NodeProgram("ozone.mjs", settings, packages) as program:
        yield program


def account(name: str) -> dict[str, Any]:
    """An account as a subject; `name` is at most 24 letters."""
    return {"$type": "com.atproto.admin.defs#repoRef", "did": f"did:plc:{name:x<24}"}


def record(name: str, key: str) -> dict[str, Any]:
    """A record of an account as a subject."""
    return {
        "$type": "com.atproto.repo.strongRef",
        "uri": f"at://did:plc:{name:x<24}/app.bsky.feed.post/{key}",
        "cid": "bafyreidfayvfuwqa7qlnopdjiqrxzs6blmoeu4rujcjtnci5beludirz2a",
    }
