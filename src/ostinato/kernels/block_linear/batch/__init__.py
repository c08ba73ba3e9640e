"""Block-quantized products for some rows of x: int8 activations and the tensor cores' integer products."""
