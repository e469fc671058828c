"""Asynchronous jobs: accepted with 202, followed as server-sent events, read for as long as they are kept."""
