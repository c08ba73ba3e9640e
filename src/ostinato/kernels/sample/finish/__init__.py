"""The choice of each row, its log-probs, and the step's bookkeeping."""
