"""Measures a device's peak: the speed of its matrix products, and the most memory used."""

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
FEW_CORES = 4  # up to here 512x512 products reach the speed of larger ones, in about 10 ms


def matrix_products(
    device: torch.device, dtype: torch.dtype, size: int, repeats: int = 10
) -> dict[str, float]:
    """Measures the FLOP/s of a (size, size) matrix product, as torch.mm and as a 1x1 convolution.

    The two may differ: on a CPU, MKL computes the first and oneDNN the second. torch's global
    random state is not touched.

    Args:
        device: The device to measure.
        dtype: The matrices' dtype.
        size: The matrices' size, a multiple of 16.
        repeats: Runs of each, the fastest of which counts.

    Returns:
        FLOP/s by name, "torch.mm" and "1x1 convolution".
    """
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator)
    # channels_last; with a batch below 16, a single thread would use MKL here too
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
        device: A CPU, measured with 512x512 products on up to FEW_CORES cores and 1024x1024 on
            more, or a CUDA GPU, measured with 8192x8192 as in `ddpm.benchmark`.
        precision: The run's precision.

    Returns:
        FLOP/s of the faster matrix product; None for other devices, or if memory is short.
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
    """Returns the peak memory use so far in bytes: the GPU's, or on a CPU the whole process's.

    Returns None where the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # missing on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _best(call: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Returns the seconds of the fastest call."""
    call()
    found = []
    for _ in range(repeats):
        wait_for(device)
        began = time.perf_counter()
        call()
        wait_for(device)
        found.append(time.perf_counter() - began)
    return min(found)
