"""Training data, from raw files to packed rows: sources, handlers, label masks, token stores, packing, loading."""
