"""The bundled toy world: its grammar, and an oracle that checks text against it. scripts/train_toylm.py trains the
model."""
