"""From a named data set to batches.

Sources (places: files, tables, packages) -> decoding (uint8 array, once) -> batches (float,
[-1, 1]).
"""
