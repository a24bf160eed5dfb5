"""Tuning: which way of doing the same work is fastest here, measured and checked."""
