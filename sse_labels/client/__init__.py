"""Reads the stream of any server, for all commands that need it."""
