"""Precision: what numbers are computed in, said to torch in one place.

"fp32": everything in float32. "tf32": products of float32 matrices and convolutions as TF32 on an
NVIDIA GPU (Ampere and later), which has 10 bits of mantissa there; elsewhere the same as "fp32".
"bf16", "fp16": the network's products in that type by torch's autocast, what is left as "tf32".
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ddpm.system.names import Precision

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS gives the same bits each time


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Returns the context in which a network's forward pass computes in this precision."""
    if precision not in AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision])


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Says in what float32 numbers are multiplied, and puts back what was said before.

    torch has flags of old and new ones that may contradict each other; it then refuses to answer,
    in the middle of a compilation for instance. So all are set, and agree.
    """
    new = _Knobs.read()
    try:
        old: _Flags | None = _Flags.read()
    except RuntimeError:  # somebody's flags disagree already: torch does not tell the old ones
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
    """Has a GPU give the same bits each time, if wanted, at the cost of speed and memory.

    Elsewhere it holds anyway, and nothing is set.

    Raises:
        ValueError: If the environment has cuBLAS do otherwise.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    # read by cuBLAS at its first product, after this
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
    if workspace not in WORKSPACES:
        raise ValueError(
            f"CUBLAS_WORKSPACE_CONFIG={workspace}: runtime.deterministic=true needs "
            f"{' or '.join(WORKSPACES)}; unset it"
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
    """Returns what a run computes in on a device, and what is promised of its bits."""
    gpu = device.type == "cuda"
    rest = "float32" if precision == "fp32" or not gpu else "float32 with products in TF32"
    said = rest if precision not in AUTOCAST else f"{precision} by autocast, the rest in {rest}"
    same = "the same bits each time" if deterministic or not gpu else "the same to rounding"
    return f"{said}; {same}"


class _Flags:
    """torch's flags of old."""

    def __init__(self, matmul: str, cudnn: bool) -> None:
        self.matmul, self.cudnn = matmul, cudnn

    @classmethod
    def read(cls) -> "_Flags":
        return cls(torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)

    def write(self) -> None:
        torch.set_float32_matmul_precision(self.matmul)
        torch.backends.cudnn.allow_tf32 = self.cudnn


class _Knobs:
    """torch's new ones: the products of cuBLAS, what cuDNN has, and a CPU's by oneDNN."""

    def __init__(self, *values: str) -> None:
        self.values = values

    @staticmethod
    def owners() -> list[Any]:
        gpu: Any = torch.backends.cudnn
        cpu: Any = torch.backends.mkldnn  # of these attributes torch's stubs know nothing
        matmul = torch.backends.cuda.matmul
        return [matmul, gpu, gpu.conv, gpu.rnn, cpu.matmul, cpu.conv, cpu.rnn]

    @classmethod
    def read(cls) -> "_Knobs":
        return cls(*[owner.fp32_precision for owner in cls.owners()])

    def write(self) -> None:
        for owner, value in zip(self.owners(), self.values, strict=True):
            owner.fp32_precision = value
