"""Keeps environment variables out of the numbers: a run depends on its configuration alone.

The underlying libraries also read environment variables. Those that change numbers beyond rounding
are refused here, or have no effect:

- ACCELERATE_GRADIENT_ACCUMULATION_STEPS, ACCELERATE_DYNAMO_* and ACCELERATE_MIXED_PRECISION have no
  effect: `processes.accelerator_for` passes all three settings to Accelerate;
- TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which NVIDIA's images set, is undone by `check_environment`.

Variables that change only speed, memory or rounding are left to the user: thread counts, CPU
instruction sets, workspaces, the choice of algorithms.
"""

import functools
import os
from typing import NamedTuple

import torch

OFF = frozenset({"", "0", "false", "no", "off", "n", "f"})

_PRECISION = "training.precision sets the precision"
_COMPILED = "runtime.tune sets whether the network is compiled, and the code decides how"
_PROCESSES = "each process holds the whole network and a share of training.batch_size"


class Variable(NamedTuple):
    """An environment variable that changes numbers.

    Attributes:
        says: What decides the matter instead, for the error message.
        harmless: Values that change nothing, in lower case.
    """

    says: str
    harmless: frozenset[str] = OFF


REFUSED = {
    # oneDNN: convolutions on a CPU in bfloat16 (the second is the older name)
    "ONEDNN_DEFAULT_FPMATH_MODE": Variable(_PRECISION, frozenset({"", "strict"})),
    "DNNL_DEFAULT_FPMATH_MODE": Variable(_PRECISION, frozenset({"", "strict"})),
    # NVIDIA's libraries: overrides whatever torch requests
    "NVIDIA_TF32_OVERRIDE": Variable(_PRECISION, frozenset({""})),
    # cuBLAS: the bits of emulated float64 products, and which of inf and nan survive them
    "CUBLAS_FIXEDPOINT_EMULATION_MANTISSA_BIT_COUNT": Variable(_PRECISION, frozenset({""})),
    "CUBLAS_EMULATION_SPECIAL_VALUES_SUPPORT_MASK": Variable(_PRECISION, frozenset({""})),
    # Triton: products in compiled code, even where torch forbids TF32
    "TRITON_F32_DEFAULT": Variable(_PRECISION, frozenset({""})),
    "PYTORCH_MPS_FAST_MATH": Variable(_PRECISION, frozenset({"", "0"})),
    # Inductor: approximate functions; weights frozen as constants, which would hide the averaged
    # weights; any of its own settings, such as the random numbers that dropout uses
    "TORCHINDUCTOR_USE_FAST_MATH": Variable(_COMPILED),
    "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG": Variable(_COMPILED),
    "TORCHINDUCTOR_FREEZING": Variable(_COMPILED),
    "TORCH_COMPILE_OVERRIDE_BACKENDS": Variable(_COMPILED, frozenset({""})),
    "TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS": Variable(_COMPILED, frozenset({""})),
    "TORCH_COMPILE_OVERRIDE_DYNAMO_CONFIGS": Variable(_COMPILED, frozenset({""})),
    # Accelerate: linear layers in 8 bits at any precision; other ways to split a run, with their
    # own clipping, accumulation and precision; another device than the requested one
    "ACCELERATE_FP8_BACKEND": Variable(_PRECISION, frozenset({"", "no"})),
    "ACCELERATE_USE_DEEPSPEED": Variable(_PROCESSES),
    "ACCELERATE_USE_FSDP": Variable(_PROCESSES),
    "ACCELERATE_USE_MEGATRON_LM": Variable(_PROCESSES),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Variable(_PROCESSES),
    "ACCELERATE_TORCH_DEVICE": Variable("runtime.device sets the device", frozenset({""})),
}


def check_environment() -> None:
    """Refuses environment variables that change the numbers; call it before computing anything.

    It also undoes TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, once per process.

    Raises:
        ValueError: If such a variable is set; the message names the first.
    """
    for name, variable in REFUSED.items():
        value = os.environ.get(name, "")
        if value.strip().lower() not in variable.harmless:
            raise ValueError(f"{name}={value} would change the numbers: unset it; {variable.says}")
    _forget_override()


@functools.cache  # once: a run sets the flag itself later
def _forget_override() -> None:
    """Resets the one flag that torch takes from the environment."""
    if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "").lower() not in OFF:
        torch.backends.cuda.matmul.allow_tf32 = False
