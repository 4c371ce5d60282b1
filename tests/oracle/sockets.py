"""A consumer by WebSocket; the same oracle checks it."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from typing import Any
from urllib.parse import urlencode

import aiohttp
from atproto_core.exceptions import AtProtocolError
from atproto_subscription.frames import ErrorFrame, Frame

from oracle.consumers import Consumer
from oracle.wire import WireError

PATH = "/xrpc/com.atproto.label.subscribeLabels"


class SocketConsumer(Consumer):
    """Reads `subscribeLabels`; frames are decoded by the Python SDK of the AT Protocol."""

    #: A server that stops breaks the connection off, so that clients reconnect.
    gets_server_stopping = False

    async def _read(self) -> None:
        parameters = [*self.wanted.parameters(), ("cursor", self._last_id or str(self.start))]
        url = f"http://127.0.0.1:{self._port}{PATH}?{urlencode(parameters)}"
        seconds = self._random.uniform(0.05, 3.0) if self.restless and not self.hurry else None
        try:
            async with (
                asyncio.timeout(seconds),
                aiohttp.ClientSession() as session,
                session.ws_connect(url, autoping=False) as socket,
            ):
                self.streams += 1
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.PING:
                        self.heartbeats += 1
                        await socket.pong(message.data)
                        continue
                    if message.type is not aiohttp.WSMsgType.BINARY:
                        raise WireError(f"{message.type} {message.data!r}")
                    self._decode(message.data)
        except aiohttp.WSServerHandshakeError as error:
            if error.status not in (502, 503):
                self.complaints.append(f"{self.name}: {error.status}")
        except aiohttp.ClientError as error:
            self.ends[type(error).__name__] += 1

    def _decode(self, payload: bytes) -> None:
        try:
            frame = Frame.from_bytes(payload)
        except AtProtocolError as error:
            raise WireError(f"no frame: {error}") from None
        if isinstance(frame, ErrorFrame):
            body = {"error": frame.body.error, "message": frame.body.message}
            self._take("error", self._last_id, json.dumps(body, separators=(",", ":")))
            return
        if frame.header.t != "#labels":
            raise WireError(f"{frame.header.t} {frame.body}")
        seq = frame.body["seq"]
        self._take("message", str(seq), json.dumps(_as_json(frame.body)))
        self._last_id, self.position = str(seq), seq


def _as_json(value: Any) -> Any:
    """Return the data model's JSON form (https://atproto.com/specs/data-model)."""
    if isinstance(value, bytes):
        return {"$bytes": b64encode(value).decode().rstrip("=")}
    if isinstance(value, dict):
        return {name: _as_json(each) for name, each in value.items()}
    return [_as_json(each) for each in value] if isinstance(value, list) else value
