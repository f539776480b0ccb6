"""Comparisons of two things that should be the same."""
