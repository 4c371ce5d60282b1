"""sse_labels: moderation labels out of PostgreSQL as Server-Sent Events, in order, nothing lost."""

__version__ = "0.1.0"
