"""A run's numbers follow from its configuration alone.

Environment variables that would change them have no effect or are refused.
"""

import json
import os
import subprocess
import sys

import pytest

from ddpm.system import devices
from ddpm.system.environment import REFUSED
from ddpm.system.processes import accelerator_for, find_processes

# for each variable that is not a switch, a value that changes numbers
CHANGES = {
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "DNNL_DEFAULT_FPMATH_MODE": "any",
    "NVIDIA_TF32_OVERRIDE": "0",
    "CUBLAS_FIXEDPOINT_EMULATION_MANTISSA_BIT_COUNT": "8",
    "TRITON_F32_DEFAULT": "tf32",
    "TORCH_COMPILE_OVERRIDE_BACKENDS": ">=0:eager",
    "TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS": ">=0:fallback_random=False",
    "TORCH_COMPILE_OVERRIDE_DYNAMO_CONFIGS": ">=0:suppress_errors=True",
    "ACCELERATE_FP8_BACKEND": "AO",
    "ACCELERATE_TORCH_DEVICE": "meta",
}
HARMLESS = [
    *((name, "") for name in REFUSED),
    ("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT"),
    ("PYTORCH_MPS_FAST_MATH", "0"),
    ("TORCHINDUCTOR_FREEZING", "0"),
    ("ACCELERATE_USE_FSDP", "false"),
    ("ACCELERATE_FP8_BACKEND", "NO"),
    # accelerate launch sets these for speed and rounding
    ("ACCELERATE_MIXED_PRECISION", "bf16"),
    ("ACCELERATE_DYNAMO_BACKEND", "NO"),
    ("ACCELERATE_DYNAMO_USE_DYNAMIC", "False"),
    ("ACCELERATE_USE_CPU", "False"),
    ("OMP_NUM_THREADS", "1"),
    ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
]
ENTRANCES = {
    "training": lambda: accelerator_for("cpu", "fp32").__enter__(),
    "sampling": lambda: find_processes("cpu"),
    "grids": lambda: devices.device("cpu"),
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in REFUSED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", REFUSED)
def test_a_variable_that_changes_numbers_is_refused_in_one_line(name, monkeypatch):
    value = CHANGES.get(name, "1")
    monkeypatch.setenv(name, value)
    for enter in ENTRANCES.values():
        with pytest.raises(ValueError, match=f"^{name}={value} would change the numbers") as no:
            enter()
        assert "\n" not in str(no.value)
        assert str(no.value).endswith(REFUSED[name].says)


@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_a_variable_that_changes_nothing_is_left_alone(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert devices.device("cpu").type == "cpu"


@pytest.mark.parametrize("command", ["train", "benchmark", "plan"])
def test_a_command_says_so_and_stops(command, typed, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    done = typed(command, *tiny, f"outputs={tmp_path}")
    assert done.code == 1
    assert done.err.startswith("error: ONEDNN_DEFAULT_FPMATH_MODE=BF16 would change")
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_accelerate_reads_does_not_change_a_run(
    typed, tiny, run_folder, tmp_path, monkeypatch
):
    for name, value in (
        ("GRADIENT_ACCUMULATION_STEPS", "4"),
        ("DYNAMO_BACKEND", "EAGER"),
        ("MIXED_PRECISION", "bf16"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    done = typed("train", *tiny, f"outputs={tmp_path}")
    assert done.code == 0, done.err
    expected = json.loads((run_folder / "metrics.jsonl").read_text())
    assert json.loads((done.run / "metrics.jsonl").read_text()) == expected
    with accelerator_for("cpu", "fp32") as accelerator:
        assert accelerator.gradient_accumulation_steps == 1
        assert accelerator.state.dynamo_plugin.backend.value == "NO"


def test_torch_takes_no_order_to_use_tf32_from_the_environment():
    """The variable sets a flag when torch is imported."""
    code = (
        "from ddpm.system import devices; import torch; flag = torch.backends.cuda.matmul; "
        "print(flag.allow_tf32); devices.device('cpu'); print(flag.allow_tf32); "
        "flag.allow_tf32 = True; devices.device('cpu'); print(flag.allow_tf32)"  # a run's own
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.split() == ["True", "False", "True"], done.stderr
