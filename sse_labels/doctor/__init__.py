"""The doctor: looks at a deployment from the database to a reader, and says what is wrong.

Promises: each check runs by itself, and one that cannot says why; nothing is changed,
unless publishing was asked for.
Stands above the corridor, beside the workers: it runs no server, and asks one.
Does not belong here: how findings are printed (`cli.doctor`).
"""

from sse_labels.doctor.checkup import examine
from sse_labels.doctor.findings import Finding, Target, Verdict

__all__ = ["Finding", "Target", "Verdict", "examine"]
