"""From text files to token sequences: readers, token cache, packing, sampling order, loader."""
