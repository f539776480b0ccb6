"""Checkpoints of every format: read as Hugging Face names and layout, written tensor by tensor."""
