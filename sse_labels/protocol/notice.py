"""A notice: reports that one label has expired. Encoded once and shared by all connections.

Promises: each encoding is made when the first consumer needs it, and only once. The label in a
notice has the same form as it had on the stream.
"""

from __future__ import annotations

from functools import cached_property

from sse_labels.protocol.label import Row, label_json
from sse_labels.protocol.sse import chunked, encode_info
from sse_labels.protocol.xrpc import cbor_label
from sse_labels.protocol.xrpc import encode_info as encode_message

NAME = "LabelExpired"


class Notice:
    """The label of a row expired at the time `at`, in seconds since 1970."""

    def __init__(self, at: float, row: Row) -> None:
        self.at = at
        self.seq = row.seq
        #: The fields that a filter compares.
        self.filter_key = (row.src, row.uri, row.val)
        #: A newer label with the same key is streamed: the notice need not be sent any more.
        self.superseded = False
        self._label = label_json(*row.columns)
        self._message = f"the label of seq {self.seq} has expired"

    def __repr__(self) -> str:
        return f"<Notice of {self.seq}, expired at {self.at}>"

    @cached_property
    def block(self) -> bytes:
        """The notice as an `info` event."""
        return encode_info(NAME, self._message, seq=self.seq, label=self._label)

    @cached_property
    def wire(self) -> bytes:
        """The notice as an `info` event in HTTP's chunked coding."""
        return chunked(self.block)

    @cached_property
    def message(self) -> bytes:
        """The notice as an `#info` message of `subscribeLabels`."""
        label = cbor_label(self._label)
        return encode_message(NAME, self._message, seq=self.seq, label=label)
