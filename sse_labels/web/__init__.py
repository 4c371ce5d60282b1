"""The HTTP side: each handler module answers one kind of request."""
