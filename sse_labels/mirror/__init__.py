"""Mirrors: store the labels of other labelers in this database.

Promises: each label of an upstream is stored once, even after a crash.
`upstream` reads one labeler's stream. `following` decides when to connect and what to store.
`storing` writes the rows and the cursor.
"""
