"""Block-quantized products for few rows of x: int8 activations and dp4a."""
