"""Talking to a round of a run: the same message answered by the base, the steered student and the healed one."""
