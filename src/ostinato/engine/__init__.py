"""The engine: token ids in, token ids out; one graph replay per step."""
