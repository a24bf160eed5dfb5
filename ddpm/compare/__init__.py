"""Compares runs: tables, plots, reports, grids of samples from the same noise."""
