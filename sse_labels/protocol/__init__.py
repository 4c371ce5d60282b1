"""The AT Protocol and the wire: pure, no I/O, no clock."""
