"""The Python SDK of the AT Protocol, over WebSocket."""

from __future__ import annotations

import os
import warnings

from say import say

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from atproto import FirehoseSubscribeLabelsClient, models, parse_subscribe_labels_message

client = FirehoseSubscribeLabelsClient(
    models.ComAtprotoLabelSubscribeLabels.Params(cursor=0), base_uri=os.environ["SOCKET"] + "/xrpc"
)
client._max_reconnect_delay_sec = 1


def receive(frame: object) -> None:
    message = parse_subscribe_labels_message(frame)
    seq = getattr(message, "seq", None)
    if seq is not None:
        say("message", f'{{"seq":{seq}}}')
        client.update_params({"cursor": seq})


client.start(receive)
