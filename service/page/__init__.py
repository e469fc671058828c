"""The page at /: what a person sees who opens the service's address in a browser. No torch, and nothing of the jobs."""
