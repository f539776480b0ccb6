"""Comparisons of training runs that should agree."""
