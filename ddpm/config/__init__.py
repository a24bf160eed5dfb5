"""Composes, checks and explains configurations, and builds what they name."""
