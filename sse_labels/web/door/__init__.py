"""TCP connections: accept, refuse and end them. All undocumented uses of aiohttp are here."""
