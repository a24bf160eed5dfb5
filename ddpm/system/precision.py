"""Sets torch's precision, in one place.

"fp32": everything in float32. "tf32": float32 matrix products and convolutions in TF32 (10 bits of
mantissa) on NVIDIA GPUs from Ampere on; elsewhere the same as "fp32". "bf16", "fp16": the network's
products in that dtype through torch's autocast, everything else as in "tf32".
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ddpm.system.names import Precision

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
WORKSPACES = (":4096:8", ":16:8")  # cuBLAS is deterministic with these


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Returns a context in which a network's forward pass computes in this precision."""
    if precision not in AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision])


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Sets the precision of float32 products inside the block, and restores it afterwards.

    torch has old and new flags that may contradict each other. It then raises when asked, for
    instance in the middle of a compilation. So this sets all of them, consistently.
    """
    new = _Knobs.read()
    try:
        old: _Flags | None = _Flags.read()
    except RuntimeError:  # the flags already contradict each other: the old ones cannot be read
        old = None
    allowed = precision != "fp32"
    _Flags("high" if allowed else "highest", allowed).write()
    _Knobs(*["tf32" if allowed else "ieee"] * 4, *["ieee"] * 3).write()
    try:
        yield
    finally:
        if old is not None:
            old.write()
        new.write()


@contextmanager
def deterministic(device: torch.device, wanted: bool) -> Iterator[None]:
    """Makes a GPU give the same bits each time, at the cost of speed and memory.

    Other devices do so anyway, so nothing is set for them.

    Args:
        device: The device.
        wanted: Does nothing if False.

    Raises:
        ValueError: If CUBLAS_WORKSPACE_CONFIG prevents it.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    # cuBLAS reads this at its first product, which comes later
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
    if workspace not in WORKSPACES:
        raise ValueError(
            f"CUBLAS_WORKSPACE_CONFIG={workspace} does not work with runtime.deterministic=true, "
            f"which needs {' or '.join(WORKSPACES)}: unset it"
        )
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


def in_words(device: torch.device, precision: Precision, deterministic: bool) -> str:
    """Returns a run's arithmetic on a device in words, and how reproducible its bits are."""
    gpu = device.type == "cuda"
    rest = "float32" if precision == "fp32" or not gpu else "float32 with products in TF32"
    said = rest if precision not in AUTOCAST else f"{precision} by autocast, the rest in {rest}"
    same = "the same bits each time" if deterministic or not gpu else "the same to rounding"
    return f"{said}; {same}"


class _Flags:
    """torch's old precision flags."""

    def __init__(self, matmul: str, cudnn: bool) -> None:
        self.matmul, self.cudnn = matmul, cudnn

    @classmethod
    def read(cls) -> "_Flags":
        return cls(torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)

    def write(self) -> None:
        torch.set_float32_matmul_precision(self.matmul)
        torch.backends.cudnn.allow_tf32 = self.cudnn


class _Knobs:
    """torch's new precision flags, for cuBLAS, cuDNN, and oneDNN on a CPU."""

    def __init__(self, *values: str) -> None:
        self.values = values

    @staticmethod
    def owners() -> list[Any]:
        gpu: Any = torch.backends.cudnn
        cpu: Any = torch.backends.mkldnn  # torch's stubs lack these attributes
        matmul = torch.backends.cuda.matmul
        return [matmul, gpu, gpu.conv, gpu.rnn, cpu.matmul, cpu.conv, cpu.rnn]

    @classmethod
    def read(cls) -> "_Knobs":
        return cls(*[owner.fp32_precision for owner in cls.owners()])

    def write(self) -> None:
        for owner, value in zip(self.owners(), self.values, strict=True):
            owner.fp32_precision = value
