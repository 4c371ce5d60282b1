"""The HTTP side: each file answers one kind of request."""
