"""Which experts a token goes to: the router's logits, the choice of the largest, and lists of tokens by expert."""
