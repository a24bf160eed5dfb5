"""Tuning: measures which way of doing the same work is fastest here, and checks it."""
