"""Statistics of chunks of the vocabulary: what the kernels that follow read in place of the logits."""
