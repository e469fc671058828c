"""Between API and workers: accepts jobs, hands them out under leases, keeps one result each."""
