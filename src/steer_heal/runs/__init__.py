"""A run on disk: its events, checkpoints and lock."""
