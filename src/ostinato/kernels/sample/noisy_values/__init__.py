"""What the kernels share: the values that a row's settings make of its logits, and the noise of each token."""
