"""Programs that measure: each prints a table, or with --json one JSON document on standard output."""
