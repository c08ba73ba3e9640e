"""Top-k, top-p and min-p: which tokens can pass, and which of those that pass is drawn."""
