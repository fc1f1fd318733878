"""The bundled toy world: its grammar, and the oracle that reads it. scripts/train_toylm.py trains the model."""
