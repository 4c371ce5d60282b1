"""The AT Protocol and its bytes on the wire. Pure functions: no I/O, no clock."""
