"""PostgreSQL: connections, the schema, SQL blocks. Nothing here knows what a label is."""
