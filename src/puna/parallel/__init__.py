"""Parallelism over several processes, applied to a model that itself knows nothing of ranks."""
