"""The language model: loading, decoding, steering, adapters, divergences."""
