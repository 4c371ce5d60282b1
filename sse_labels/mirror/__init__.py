"""Mirrors: other labelers' labels, stored here.

Promises: whatever dies, a label of an upstream's is stored once.
Stands before the corridor, in the order of the files: `upstream` reads one labeler's stream,
`following` decides what to do about it, `storing` makes it rows, beside the cursor.
Does not belong here: serving what was stored; publishing.
"""
