"""What is shown of a run: lines, files, pages, trackers."""
