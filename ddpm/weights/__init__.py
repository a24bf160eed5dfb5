"""Weights exchanged with other projects: diffusers folders, the hub, OpenAI's checkpoints."""
