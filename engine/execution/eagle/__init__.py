"""The trained drafter of one layer: its file, its passes while serving, and its training."""
