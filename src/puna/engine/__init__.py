"""Generation: paged cache, continuous batching, sampling."""
