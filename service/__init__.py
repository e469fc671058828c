"""The HTTP service: API, broker and worker processes around a TarFlow."""
