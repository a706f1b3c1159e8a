"""What a run keeps: its checkpoints, and what it began with."""
