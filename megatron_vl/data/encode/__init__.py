"""Samples to rows: text to tokens, media to patches, samples that share a row."""
