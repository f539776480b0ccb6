"""Benchmarks of generation: latency over a grid of shapes, throughput of a queue of requests, tables and charts."""
