"""Clients in worker processes: the jobs, the pool that hands them out, a worker."""
