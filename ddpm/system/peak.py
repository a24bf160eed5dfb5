"""What a device can do at most: the speed of its matrix products, and the memory that was used."""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm.system.devices import wait_for
from ddpm.system.names import Precision

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
FEW_CORES = 4  # whose products of 512 are as fast as larger ones, and take a hundredth of a second


def matrix_products(
    device: torch.device, dtype: torch.dtype, size: int, repeats: int = 10
) -> dict[str, float]:
    """Measures FLOP/s of (size, size) matrix products, the best of ten each.

    Once as torch.mm, and once as the 1x1 convolution that is one too. They may differ: on a CPU the
    one is MKL's, the other oneDNN's. torch's own random numbers are left as they are.

    Args:
        device: Where they run.
        dtype: Of the matrices.
        size: A multiple of 16.
        repeats: Of each, the best of which counts.

    Returns:
        FLOP/s by name, "torch.mm" and "1x1 convolution".
    """
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator)
    # channels_last; a batch of 16, below which one thread has MKL's here too
    rows = a.reshape(16, 1, size // 16, size).permute(0, 3, 1, 2)
    flops = 2 * size**3
    return {
        "torch.mm": flops / _best(lambda: torch.mm(a, b), device, repeats),
        "1x1 convolution": flops
        / _best(lambda: F.conv2d(rows, b[:, :, None, None]), device, repeats),
    }


@torch.no_grad()
def quick_peak(device: torch.device, precision: Precision) -> float | None:
    """Measures a device's peak in well under a second, for a run that is about to start on it.

    Args:
        device: A CPU, whose products are of 512 on FEW_CORES and of 1024 on more, or a GPU of
            CUDA, which takes 8192 as `ddpm.benchmark` does.
        precision: Of the run.

    Returns:
        FLOP/s of the faster matrix product; None for another device, or one without the room.
    """
    if device.type not in ("cpu", "cuda"):
        return None
    size = 8192
    if device.type == "cpu":
        size = 512 if torch.get_num_threads() <= FEW_CORES else 1024
    try:
        return max(matrix_products(device, DTYPES[precision], size, repeats=3).values())
    except torch.OutOfMemoryError:
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Returns the most bytes used so far: of a GPU's memory, or on a CPU of the whole process.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _best(call: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Seconds."""
    call()
    found = []
    for _ in range(repeats):
        wait_for(device)
        began = time.perf_counter()
        call()
        wait_for(device)
        found.append(time.perf_counter() - began)
    return min(found)
