"""Timing of a model: latency over a grid of shapes, throughput of a queue of requests."""
