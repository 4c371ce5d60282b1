"""A stage with nginx before two servers, and the faults of all three."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from oracle.stage import Stage, staged
from sse_labels.embedded import EmbeddedPostgres

from support.database import until
from support.nginx import Nginx, nginx
from support.program import free_port


@dataclass
class Behind:
    """Consumers read through nginx, which has two servers. Writers use the database directly."""

    stage: Stage
    proxy: Nginx

    async def reload(self) -> None:
        """Reload nginx, as `nginx -s reload` does; wait until its old workers have ended."""
        workers = await asyncio.to_thread(self.proxy.reload)
        assert len(workers) == 2
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))

    async def restart_nginx(self, number: signal.Signals) -> None:
        """End nginx and start it again on the same ports."""
        await asyncio.to_thread(self.proxy.restart, number)
        await until(lambda: answers(self.proxy))

    async def restart_server(self, number: signal.Signals) -> None:
        """End one of the two servers and start it again."""
        await self.stage.stop_server(number)
        await self.stage.start_server()


@asynccontextmanager
async def behind_nginx(postgres: EmbeddedPostgres, seed: str) -> AsyncIterator[Behind]:
    """A stage that has begun; the caller ends it and gets the verdict."""
    async with staged(postgres, seed) as stage:
        second = free_port()
        other = stage.another_server(second)
        try:
            await asyncio.to_thread(other.url)
            with nginx(stage.port, second) as proxy:
                await until(lambda: answers(proxy))
                stage.front_port = proxy.port
                await stage.begin()
                yield Behind(stage, proxy)
        finally:
            other.end()


async def answers(proxy: Nginx) -> bool:
    """Whether a server answers through nginx."""
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(f"{proxy.url}/health/live") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False
