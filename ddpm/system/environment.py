"""The environment computes nothing: a run's numbers follow from its configuration alone.

The libraries below take orders from environment variables too. Those that change numbers beyond
rounding are refused here, or have no say:

- ACCELERATE_GRADIENT_ACCUMULATION_STEPS, ACCELERATE_DYNAMO_* and ACCELERATE_MIXED_PRECISION, since
  `processes.accelerator_for` gives Accelerate all three;
- TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which NVIDIA's images set: see `check_environment`.

Variables that change speed, memory or rounding are the user's own: thread counts, the instructions
of a CPU, workspaces, the choice among algorithms.
"""

import functools
import os
from typing import NamedTuple

import torch

OFF = frozenset({"", "0", "false", "no", "off", "n", "f"})

_PRECISION = "training.precision says how numbers are multiplied"
_COMPILED = "runtime.tune says whether a network is compiled, and the code decides how"
_PROCESSES = "each process has the whole network and a share of training.batch_size"


class Variable(NamedTuple):
    """An environment variable that changes numbers.

    Attributes:
        says: What says such things instead, for the user.
        harmless: The values, in lower case, with which it changes nothing.
    """

    says: str
    harmless: frozenset[str] = OFF


REFUSED = {
    # oneDNN: a CPU's convolutions in bfloat16 (the second is the older name)
    "ONEDNN_DEFAULT_FPMATH_MODE": Variable(_PRECISION, frozenset({"", "strict"})),
    "DNNL_DEFAULT_FPMATH_MODE": Variable(_PRECISION, frozenset({"", "strict"})),
    # NVIDIA's libraries: it wins over all that torch asks of them
    "NVIDIA_TF32_OVERRIDE": Variable(_PRECISION, frozenset({""})),
    # cuBLAS: float64 products of so many bits, and which of inf and nan survive an emulated one
    "CUBLAS_FIXEDPOINT_EMULATION_MANTISSA_BIT_COUNT": Variable(_PRECISION, frozenset({""})),
    "CUBLAS_EMULATION_SPECIAL_VALUES_SUPPORT_MASK": Variable(_PRECISION, frozenset({""})),
    # Triton: products in compiled code, also where torch forbids TF32
    "TRITON_F32_DEFAULT": Variable(_PRECISION, frozenset({""})),
    "PYTORCH_MPS_FAST_MATH": Variable(_PRECISION, frozenset({"", "0"})),
    # Inductor: approximate functions; weights taken for constants, so that those of the average
    # are not seen; any setting of its own, such as whose random numbers dropout takes
    "TORCHINDUCTOR_USE_FAST_MATH": Variable(_COMPILED),
    "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG": Variable(_COMPILED),
    "TORCHINDUCTOR_FREEZING": Variable(_COMPILED),
    "TORCH_COMPILE_OVERRIDE_BACKENDS": Variable(_COMPILED, frozenset({""})),
    "TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS": Variable(_COMPILED, frozenset({""})),
    "TORCH_COMPILE_OVERRIDE_DYNAMO_CONFIGS": Variable(_COMPILED, frozenset({""})),
    # Accelerate: linear layers in 8 bits, whatever its precision; other ways to share a run, with
    # clipping, accumulation and precision of their own; another device than the one asked for
    "ACCELERATE_FP8_BACKEND": Variable(_PRECISION, frozenset({"", "no"})),
    "ACCELERATE_USE_DEEPSPEED": Variable(_PROCESSES),
    "ACCELERATE_USE_FSDP": Variable(_PROCESSES),
    "ACCELERATE_USE_MEGATRON_LM": Variable(_PROCESSES),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Variable(_PROCESSES),
    "ACCELERATE_TORCH_DEVICE": Variable("runtime.device says where it runs", frozenset({""})),
}


def check_environment() -> None:
    """Refuses variables that change what is computed; called before anything is.

    Raises:
        ValueError: For the first that is set; it names it.
    """
    for name, variable in REFUSED.items():
        value = os.environ.get(name, "")
        if value.strip().lower() not in variable.harmless:
            raise ValueError(
                f"{name}={value} would change what is computed: unset it; {variable.says}"
            )
    _forget_override()


@functools.cache  # once: a run sets the flag after this
def _forget_override() -> None:
    """Takes back the one flag that torch has from the environment."""
    if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "").lower() not in OFF:
        torch.backends.cuda.matmul.allow_tf32 = False
