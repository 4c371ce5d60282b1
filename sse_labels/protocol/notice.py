"""A notice: one label has expired, encoded once and shared by all connections.

Promises: each wire's form is made when the first consumer asks for it, and never again; the label
in it is the one that the stream carried, in the same form.
Stands in the corridor beside the chunk: the expiry makes notices, everything behind hands them on.
Does not belong here: when a label expires, who is told.
"""

from __future__ import annotations

from functools import cached_property

from sse_labels.protocol.label import Row, label_json
from sse_labels.protocol.sse import chunked, encode_info
from sse_labels.protocol.xrpc import cbor_label
from sse_labels.protocol.xrpc import encode_info as encode_message

NAME = "LabelExpired"


class Notice:
    """That the label of a row expired at a time, in seconds since 1970."""

    def __init__(self, at: float, row: Row) -> None:
        self.at = at
        self.seq = row.seq
        #: What a filter looks at.
        self.looks = (row.src, row.uri, row.val)
        #: A newer label of its key is being streamed: whoever has not been told needs not be.
        self.superseded = False
        self._label = label_json(*row.columns)
        self._message = f"the label of seq {self.seq} has expired"

    def __repr__(self) -> str:
        return f"<Notice of {self.seq}, expired at {self.at}>"

    @cached_property
    def block(self) -> bytes:
        """The `info` event."""
        return encode_info(NAME, self._message, seq=self.seq, label=self._label)

    @cached_property
    def wire(self) -> bytes:
        """The `info` event in HTTP's chunked coding."""
        return chunked(self.block)

    @cached_property
    def message(self) -> bytes:
        """The `#info` message of `subscribeLabels`."""
        label = cbor_label(self._label)
        return encode_message(NAME, self._message, seq=self.seq, label=label)
