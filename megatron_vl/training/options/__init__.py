"""Everything a run can be told, where each comes from, and between which bounds it lies."""
