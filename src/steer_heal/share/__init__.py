"""Sharing a result: model cards, and what standard tasks measure."""
