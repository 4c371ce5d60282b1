"""The corridor: from the label table to what one consumer is handed. Read this first.

    label row ──> store ──> sequencer ──> outbox
     (table)     rows to    one per      one per
                 chunks     process      connection

No socket, no header, no SQL beside the store's named blocks.
"""
