"""Loss, perplexity and bits per byte of a model."""
