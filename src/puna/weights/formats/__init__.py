"""Checkpoint formats, one file or package each."""
