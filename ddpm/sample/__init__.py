"""Draws images from a run or a folder of weights; every command draws through this package."""
