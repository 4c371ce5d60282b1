"""A signature of ours is, byte for byte, the one that the real Ozone makes."""

from __future__ import annotations

import json
import random
import subprocess

import pytest
from oracle import tell

from sse_labels.protocol.label import Label
from sse_labels.protocol.signatures import SigningKey

from support.node import PACKAGES, SCRIPTS, node_folder, node_program
from support.program import environment

SECRET = "1f" * 32
LABELS = 300


def varied() -> list[Label]:
    """Labels of every form, the same ones every time."""
    chance = random.Random(6)
    return [
        Label(
            src=f"did:plc:{chance.choice('abc') * 24}",
            uri=f"at://did:plc:{'d' * 24}/app.bsky.feed.post/{number}",
            cid=chance.choice(["", "bafyreidfayvfuwqa7qlnopdjiqrxzs6blmoeu4rujcjtnci5beludirz2a"]),
            val=chance.choice(["spam", "!hide", "ü\U0001f98b", "a" * 128, "\u2028"]),
            neg=chance.random() < 0.3,
            cts=chance.choice(["2024-05-01T12:00:00.000Z", "2024-05-01T12:00:00.123456+02:00"]),
            exp=chance.choice([None, "2030-01-01T00:00:00Z"]),
            sig=None,
        )
        for number in range(LABELS)
    ]


@pytest.mark.parametrize("packages", PACKAGES)
def test_signatures_are_byte_equal_with_ozones(
    packages: str, request: pytest.FixtureRequest
) -> None:
    labels = varied()
    ran = subprocess.run(
        [node_program(), str(SCRIPTS / "sign.mjs")],
        input=json.dumps([label._asdict() for label in labels]),
        env=environment(SSE_LABELS_NODE=str(node_folder(packages)), SIGNING_KEY=SECRET),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    theirs = json.loads(ran.stdout)
    key = SigningKey(bytes.fromhex(SECRET))
    assert key.did_key == theirs["did"]
    ours = [(key.sign(label).sig or b"").hex() for label in labels]
    assert ours == theirs["signatures"]
    tell(
        request.config,
        f"{len(ours)} labels: signatures byte-equal with those of the {packages} Ozone; {ours[0]}",
    )
