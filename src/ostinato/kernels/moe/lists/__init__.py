"""Products of lists of picks on the tensor cores' integer products."""
