"""The evals: one file each; stages/evaluate.py runs them on a model state."""
