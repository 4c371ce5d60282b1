"""Reading any server's stream, once for all commands that do.

Does not belong here: what is done with what was read.
"""
