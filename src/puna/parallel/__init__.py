"""Layouts over several processes: what is set into a model that itself knows nothing of ranks."""
