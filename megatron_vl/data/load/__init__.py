"""Shards to batches: energon's loaders, mixtures, and going on where a run stood."""
