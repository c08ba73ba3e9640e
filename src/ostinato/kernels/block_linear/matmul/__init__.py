"""Block-quantized products for many rows of x: the tensor cores, on weights dequantized to bfloat16."""
