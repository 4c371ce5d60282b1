"""Reads `subscribeLabels` of any labeler over one WebSocket.

Promises: a dead connection is detected, and also one that never completes a frame. The size of a
message is bounded. Redirects are refused. Every end of the connection raises Lost or Refused.
Does not belong here: the meaning of the messages, cursors, when to connect again.

Sources: lexicon `com.atproto.label.subscribeLabels`; https://atproto.com/specs/event-stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp

from sse_labels import __version__
from sse_labels.client.answers import words
from sse_labels.client.retries import (
    CONNECT_SECONDS,
    TEMPORARY,
    Lost,
    Refused,
    Unavailable,
    after_seconds,
)
from sse_labels.protocol.xrpc import MalformedMessage

#: A ping is sent after this silence. Without an answer in half of this time the connection is dead.
SILENCE_SECONDS = 30.0
#: The time for one complete frame. A good connection brings at least one frame for each ping.
FRAME_SECONDS = 2 * SILENCE_SECONDS
#: The time to send a close. The answer to the close is not awaited.
CLOSE_SECONDS = 2.0
CLOSE_FRAME = aiohttp.WSCloseCode.OK.to_bytes(2, "big")


class LabelSocket:
    """One open WebSocket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, headers: Mapping[str, str]) -> None:
        self._socket = socket
        #: The headers of the handshake's answer.
        self.headers = headers

    async def next(self) -> bytes | None:
        """Return the next message, or None for a ping or a pong.

        Raises Lost or Refused at the end of the connection. After a MalformedMessage the caller
        may continue to read.
        """
        try:
            async with asyncio.timeout(FRAME_SECONDS):
                message = await self._socket.receive()
                if message.type is aiohttp.WSMsgType.PING:
                    await self._socket.pong(message.data)
        except TimeoutError:
            raise Lost(f"no whole frame came within {FRAME_SECONDS:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(words(str(error)) or type(error).__name__) from error
        match message.type:
            case aiohttp.WSMsgType.BINARY:
                payload: bytes = message.data
                return payload
            case aiohttp.WSMsgType.PING | aiohttp.WSMsgType.PONG:
                return None
            case aiohttp.WSMsgType.TEXT:
                raise MalformedMessage("text, expected binary")
            case aiohttp.WSMsgType.ERROR if isinstance(message.data, aiohttp.WebSocketError):
                # The server's error, not the network's: TCP delivers bytes as they were sent.
                raise Refused(f"it breaks the protocol: {words(str(message.data.args[-1]))}")
            case aiohttp.WSMsgType.ERROR:
                raise Lost(words(str(message.data)) or type(message.data).__name__)
        code = self._socket.close_code
        raise Lost("it closed the connection" + (f" with {code}" if code else ""))


@asynccontextmanager
async def label_socket(
    url: str,
    *,
    message_max_bytes: int,
    tls: ssl.SSLContext | None,
    headers: Mapping[str, str] | None = None,
    token_hint: str = "",
) -> AsyncIterator[LabelSocket]:
    """Yield an open WebSocket. Raises Lost or Refused.

    `tls` holds the trusted authorities. None means this machine's authorities. `token_hint` is
    added to the message about an answer 401.
    """
    answers: list[aiohttp.ClientResponse] = []
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"User-Agent": f"sse-labels/{__version__}", **(headers or {})},
        middlewares=[_keeping_answers(answers)],
    ) as session:
        socket = await _opened(session, url, message_max_bytes, tls, token_hint)
        try:
            yield LabelSocket(socket, answers[-1].headers)
        finally:
            # aiohttp's own close waits for the answer, and reads all other frames without giving
            # other tasks a turn. With many pings in the buffer that took seconds.
            with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await socket.send_frame(CLOSE_FRAME, aiohttp.WSMsgType.CLOSE)
            answers[-1].close()
            await socket.close()


async def _opened(
    session: aiohttp.ClientSession,
    url: str,
    max_bytes: int,
    tls: ssl.SSLContext | None,
    token_hint: str,
) -> aiohttp.ClientWebSocketResponse:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await session.ws_connect(
                url,
                heartbeat=SILENCE_SECONDS,
                max_msg_size=max_bytes,
                # With autoping aiohttp answers all buffered pings before other tasks get a turn.
                autoping=False,
                autoclose=False,
                ssl=tls or True,
            )
    except aiohttp.WSServerHandshakeError as error:
        text = f"it answered {error.status} instead of a WebSocket"
        if error.status == 401 and token_hint:
            text += f" ({token_hint})"
        if error.status not in TEMPORARY:
            raise Refused(text) from error
        raise Unavailable(text, after_seconds=after_seconds(error.headers)) from error
    except TimeoutError as error:
        raise Lost(f"no WebSocket was open within {CONNECT_SECONDS:g} s") from error
    except aiohttp.InvalidURL as error:
        raise Refused("it is not a valid address") from error
    except (aiohttp.ClientError, OSError) as error:
        raise Lost(words(str(error)) or type(error).__name__) from error


def _keeping_answers(answers: list[aiohttp.ClientResponse]) -> aiohttp.ClientMiddlewareType:
    """Return a middleware that keeps the handshake's answer, and refuses redirects.

    aiohttp's WebSocket hides the headers of that answer. `ws_connect` would follow a redirect, even
    into this network or from wss to ws.
    """

    async def keep(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        answer = await handler(request)
        if 300 <= answer.status < 400:
            answer.close()
            where = words(answer.headers.get("Location"))
            raise Refused(f"it redirects ({answer.status}) to {where}, which is not followed")
        answers.append(answer)
        return answer

    return keep
