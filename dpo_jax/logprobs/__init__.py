"""Log-probabilities of tokens, from logits or without them."""
