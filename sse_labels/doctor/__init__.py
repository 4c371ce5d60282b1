"""The doctor: checks a deployment from its database to a reader, and says what is wrong.

Promises: each check runs by itself. A check that cannot run says why. Nothing is changed, unless
publishing was asked for. The doctor runs no server; it asks one.
"""

from sse_labels.doctor.checkup import examine
from sse_labels.doctor.findings import Finding, Target, Verdict

__all__ = ["Finding", "Target", "Verdict", "examine"]
