"""The digits, which the runs of a process decode once; their own cache would take each a third of a second."""

import tempfile

CACHE = tempfile.TemporaryDirectory(prefix="ddpm-test-cache-")
DIGITS = ("data=digits", f"data.cache={CACHE.name}")
