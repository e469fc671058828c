"""The worker process: one device, one inference loop, torch."""
