"""Measures trained networks: distances, bits/dim and losses, each figure with its protocol."""
