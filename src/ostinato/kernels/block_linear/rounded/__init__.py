"""Block-quantized products for rows that are int8 already, a few columns to a scale."""
