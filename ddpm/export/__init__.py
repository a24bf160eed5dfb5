"""A run's network as a folder for diffusers."""
