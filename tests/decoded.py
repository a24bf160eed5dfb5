"""The digits, decoded once per process.

A cache of its own would cost each run a third of a second.
"""

import tempfile

CACHE = tempfile.TemporaryDirectory(prefix="ddpm-test-cache-")
DIGITS = ("data=digits", f"data.cache={CACHE.name}")
