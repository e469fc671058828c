"""The broker of many API replicas and many worker hosts: all state in Redis, every move a Lua script."""
