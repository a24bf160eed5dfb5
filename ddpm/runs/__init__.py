"""Run folders: identity, checkpoints, records and results."""
