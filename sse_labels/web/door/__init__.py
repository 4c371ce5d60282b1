"""TCP connections: accepting, refusing, ending them; all of aiohttp's undocumented parts."""
