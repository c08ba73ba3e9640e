"""What prefill of the delta rule does before the rule: gates and convolution."""
