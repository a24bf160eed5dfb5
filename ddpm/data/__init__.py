"""Turns a named data set into training batches.

Sources (files, tables, packages) -> decoding (uint8 array, once) -> batches (float, [-1, 1]).
"""
