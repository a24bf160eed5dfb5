"""Training: the loop, the state it updates, and the code around them that starts a run."""
