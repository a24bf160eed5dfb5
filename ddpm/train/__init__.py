"""Training: the loop, the state that it changes, and one start of a run around them."""
