"""The bundled toy world: grammar, oracle, data and training."""
