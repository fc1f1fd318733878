"""Sweeps: many runs from one file, on processes of this machine, on a Ray cluster, or as commands for a scheduler."""
