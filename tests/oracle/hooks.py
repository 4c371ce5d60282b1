"""Hooks in the program's process, by which a test sets its clock back and makes it raise.

The program imports them as `sitecustomize`. They look at files that the test makes.
"""

from __future__ import annotations

from pathlib import Path

TRAP_REASON = "the oracle made the sequencer raise"

#: The clock goes back by as many hours as the file `clock` has bytes. When the file `trap` exists,
#: the sequencer raises between reading rows and handing them out.
_SOURCE = """
import os, time
from sse_labels.feed.store import Store

def hours():
    try:
        return os.stat({clock!r}).st_size
    except FileNotFoundError:
        return 0

def encode(*args, with_keys=False, **kwargs):
    # Only live chunks have keys, so the caller is the sequencer.
    if with_keys:
        try:
            os.unlink({trap!r})
        except FileNotFoundError:
            pass
        else:
            raise RuntimeError({reason!r})
    return chunk(*args, with_keys=with_keys, **kwargs)

real, time.time = time.time, lambda: real() - 3600 * hours()
chunk, Store.chunk = Store.chunk, encode
"""


class Hooks:
    """The hooks of one stage; the program needs `folder` in its PYTHONPATH."""

    def __init__(self, directory: Path) -> None:
        self.folder = directory / "hooks"
        self._clock = directory / "hours-back"
        self._trap = directory / "trap"
        self.folder.mkdir()
        (self.folder / "sitecustomize.py").write_text(
            _SOURCE.format(clock=str(self._clock), trap=str(self._trap), reason=TRAP_REASON)
        )

    def set_clock_back(self) -> int:
        """Set the program's clock back by one more hour; return all hours so far."""
        with self._clock.open("ab") as file:
            file.write(b"h")
        return self._clock.stat().st_size

    def set_trap(self) -> None:
        """Make the sequencer raise at its next chunk."""
        self._trap.touch()
