"""`sse-labels demo`: a server that publishes made-up labels to itself.

Promises: only the labels are made up. Their accounts do not exist. They are published through
`POST /labels` like all other labels.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shlex
from dataclasses import replace
from datetime import UTC, datetime

import aiohttp
import click

from sse_labels.cli.layout import Command
from sse_labels.cli.options import named_as_given, option, settings_options
from sse_labels.cli.place import Place, database_of
from sse_labels.cli.serve import run
from sse_labels.cli.signals import interruptible
from sse_labels.cli.standard_streams import OutputLost
from sse_labels.config import load
from sse_labels.embedded import default_data_dir
from sse_labels.logs import configure_logging
from sse_labels.protocol.sse import dumps
from sse_labels.setting_parsers import seconds
from sse_labels.web.door.listening import base_url

log = logging.getLogger(__name__)

#: The folder of the demo's data, inside the data directory.
DEMO_FOLDER = "demo"
QUIET = {"log_level": "warning"}
#: The weight of each value, roughly as on the public network: mostly adult content and spam.
VALUES = {"porn": 30, "spam": 22, "sexual": 14, "nudity": 10, "graphic-media": 6, "rude": 6,
          "!hide": 4, "misleading": 4, "impersonation": 2, "intolerant": 2}  # fmt: skip
LABELERS = ["did:plc:demolabeleraaaaaaaaaaaaa", "did:plc:demolabelerbbbbbbbbbbbbb"]
BASE32 = "234567abcdefghijklmnopqrstuvwxyz"


@click.command(cls=Command)
@settings_options("host", "port", "data_dir", "log_level", "log_format", **QUIET)
@option(
    "interval_seconds", seconds(0.001, 60), "Mean time between two labels.",
    default="0.3",
)  # fmt: skip
def demo(interval_seconds: float, **options: str | None) -> None:
    """Serve made-up labels from an embedded PostgreSQL.

    Its data is in the folder `demo` of the data directory, apart from real
    labels.
    """
    with named_as_given(), contextlib.suppress(KeyboardInterrupt), interruptible():
        settings = load(options, defaults=QUIET)
        data_dir = (settings.data_dir or default_data_dir()) / DEMO_FOLDER
        settings = replace(settings, dsn=None, data_dir=data_dir)
        configure_logging(settings.log_level, settings.log_format)
        with database_of(settings) as place:
            tasks: set[asyncio.Task[None]] = set()

            async def ready(port: int) -> None:
                url = base_url(settings.host[0], port)
                tasks.add(asyncio.create_task(publish_forever(url, place, interval_seconds)))
                # The server serves even when standard output is lost.
                with contextlib.suppress(OutputLost):
                    click.echo(
                        f"sse_labels is up; {1 / interval_seconds:.3g} made-up labels a second.\n"
                        f"  read it     curl -N {url}/stream\n"
                        f"  from start  curl -N '{url}/stream?cursor=0'\n"
                        f"  look at it  {url}/\n"
                        f"  publish     sse-labels publish --data-dir {shlex.quote(str(data_dir))} "
                        f"--url {url} FILE\n"
                        + (f"  {place.note}\n" if place.note else "")
                        + "Ctrl-C stops it; the labels stay for the next time."
                    )

            run(settings, place, ready)


async def publish_forever(url: str, place: Place, interval_seconds: float) -> None:
    """Publish one label after another, some of them negations of earlier ones."""
    recent: list[dict[str, object]] = []
    headers = {"Authorization": f"Bearer {place.publish_token}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        while True:
            label = made_up_label(recent)
            # While the server stops or its database is away, this label is left out.
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.post(f"{url}/labels", data=dumps({"labels": [label]})) as answer:
                    if answer.status == 201:
                        recent = [*recent[-50:], label]
                    else:
                        log.warning("a label was refused", extra={"answer": await answer.text()})
            await asyncio.sleep(random.expovariate(1 / interval_seconds))


def made_up_label(recent: list[dict[str, object]]) -> dict[str, object]:
    """Return a label as a labeler would make it now; one in twelve negates an earlier label."""
    cts = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if recent and random.random() < 1 / 12:
        return {**random.choice(recent), "neg": True, "cts": cts}
    account = "did:plc:" + "".join(random.choices(BASE32, k=24))
    [val] = random.choices(list(VALUES), weights=list(VALUES.values()))
    uri = account
    if random.random() < 0.8:  # the others are about the whole account
        uri = f"at://{account}/app.bsky.feed.post/{''.join(random.choices(BASE32, k=13))}"
    return {"src": random.choice(LABELERS), "uri": uri, "val": val, "cts": cts}
