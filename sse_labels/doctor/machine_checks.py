"""Checks of this machine: how many files may be open.

Promises: it says whose limit it saw; a service's own may be another.
Does not belong here: raising the limit (`app.tune_process`).
"""

from __future__ import annotations

import resource

from sse_labels.app import database_connections
from sse_labels.config import Settings
from sse_labels.doctor.findings import Finding, ok, warning
from sse_labels.web.guard import descriptors_needed


def descriptors(settings: Settings) -> list[Finding]:
    """Say whether all connections that the settings allow find a descriptor.

    The hard limit counts: a server raises its own to that.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections
    needed = descriptors_needed(wanted, database_connections(settings))
    shown = "any number of" if hard == resource.RLIM_INFINITY else str(hard)
    seen = f"{shown} files may be open here, {wanted} connections need {needed}"
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return [ok("descriptors", seen)]
    return [
        warning(
            "descriptors",
            f"{seen}: a server started like this refuses connections before its limit",
            "raise LimitNOFILE (systemd, as nginx/sse-labels@.service does) or `ulimit -Hn`, or "
            "lower --max-connections",
        )
    ]
