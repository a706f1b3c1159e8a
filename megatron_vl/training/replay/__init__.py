"""One step of a run again: from the checkpoint before it, on the rows that it had."""
