"""Weights that others wrote, or that others read: folders of diffusers, on disk or on the hub."""
