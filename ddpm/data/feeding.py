"""How pictures come to the device: whole from the start, from the decoded file step by step, or decoded as they are needed. The batches are the same."""

import math
import shutil
from pathlib import Path
from typing import Literal

import torch

from ddpm.data.decoding import Decoding
from ddpm.data.image_set import ImageSet, folder_of
from ddpm.data.packed import Packed
from ddpm.data.shards import Source

Feed = Literal["auto", "device", "file", "decode"]


def decodes_later(feed: Feed, source: Source, decoding: Decoding, cache: Path) -> bool:
    """Whether to keep the pictures encoded: as asked, or for "auto" where decoded ones are not there and would take more than half of the free disk."""
    if feed != "auto" or (folder_of(source, decoding, cache, decode_later=False) / "about.json").is_file():
        return feed == "decode"
    disk = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.exists())
    size = len(source) * decoding.channels * decoding.height * decoding.width
    return size > shutil.disk_usage(disk).free // 2


def goes_on_device(feed: Feed, data: ImageSet, device: torch.device) -> bool:
    """Whether to hold all pictures on the device: as asked, or for "auto" on a GPU where they take less than a quarter of its free memory."""
    if isinstance(data.stored, Packed) or feed in ("file", "decode"):
        return False
    return feed == "device" or (device.type == "cuda" and math.prod(data.stored.shape) < torch.cuda.mem_get_info(device)[0] // 4)
