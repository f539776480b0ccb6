"""From raw files to packed rows of tokens: sources, handlers, masks, the token store, packing, loading."""
