"""Sharing a result: model cards, upload, standard tasks, evaluation logs."""
