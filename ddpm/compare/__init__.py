"""Runs side by side: tables, plots, grids of samples from the same noise."""
