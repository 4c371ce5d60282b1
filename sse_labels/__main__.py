"""`python -m sse_labels`: the same as `sse-labels`.

Promises: nothing beyond that.
Does not belong here: anything else.
"""

from sse_labels.cli import main

if __name__ == "__main__":
    main()
