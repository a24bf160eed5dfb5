"""From a named data set to batches: sources (where pictures lie) -> decoding (uint8 array, once) -> batches (float, [-1, 1])."""
