"""Numerical pieces that differ by device: attention backends and norms."""
