"""Asking a trained model: dialogues in a terminal or a page, and scores over datasets."""
