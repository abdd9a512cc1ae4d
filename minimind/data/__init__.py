"""From text files to rows of tokens: sources, token cache, packing, order, loader."""
