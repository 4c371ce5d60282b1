"""What the processes of one server know of each other: counts, limits, metrics.

Promises: each process writes its own part and reads all, so that nothing waits for a
lock and nothing is lost when one is killed; the rates of publishers alone, which are
read and written in one step, have a lock, which the kernel takes from a killed holder,
and which nobody waits for longer than a moment.
Stands beside the corridor, and knows none of it. A single process has no such memory.
Does not belong here: which limits there are, who starts and ends processes.
"""

from sse_labels.shared.memory import Memory, Share

__all__ = ["Memory", "Share"]
