"""What is learned of each picture of a source when all are read once."""

import hashlib
import json

import numpy as np
from PIL import Image

from ddpm.data.shards import Item


class Survey:
    """Digests of content, labels, and which do not decode.    digests: (N, 32) uint8, SHA-256.    labels: (N,) int64, -1 for none.    good: (N,) bool."""

    def __init__(self, count: int) -> None:
        self.digests = np.zeros((count, 32), dtype=np.uint8)
        self.labels = np.full(count, -1, dtype=np.int64)
        self.good = np.ones(count, dtype=bool)
        self._unreadable: dict[int, str] = {}

    def note(self, index: int, name: str, digest: bytes | None, label: int | None) -> None:
        """digest: of the content, None if it does not decode."""
        self.labels[index] = -1 if label is None else label
        if digest is None:
            self.good[index] = False
            self._unreadable[index] = name
        else:
            self.digests[index] = np.frombuffer(digest, dtype=np.uint8)

    @property
    def unreadable(self) -> list[str]:
        """Names of those that do not decode, in order."""
        return [self._unreadable[index] for index in sorted(self._unreadable)]

    def first_digests(self) -> np.ndarray:
        """(N,) uint64, the first 8 bytes of each digest."""
        return self.digests[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)

    def fingerprint(self, classes: list[str]) -> str:
        """Of content, labels and order of what decodes, 16 hex digits."""
        whole = hashlib.sha256(json.dumps(classes).encode())
        whole.update(np.concatenate([self.digests, self.labels.astype("<i8")[:, None].view(np.uint8)], axis=1)[self.good].tobytes())
        return whole.hexdigest()[:16]


def digest_of(item: Item) -> bytes:
    """SHA-256 of a picture's content: its bytes, or its pixels where nothing is encoded."""
    content = item.content.tobytes() if isinstance(item.content, Image.Image) else item.content
    return hashlib.sha256(content).digest()
