"""training.precision: TF32 is a GPU's alone, and what a run allows is forgotten after it."""

import pytest
import torch

from ddpm import run
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.runs import checkpoint
from ddpm.system.devices import products
from ddpm.system.processes import accelerator_for

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def set_flags(matmul: bool, cudnn: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.fixture(params=[(False, True), (True, False), (True, True), (False, False)])
def before(request):
    """The flags as somebody else left them."""
    own = flags()
    set_flags(*request.param)
    yield request.param
    set_flags(*own)


@pytest.mark.parametrize(
    ("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True), ("fp16", True)]
)
def test_a_gpu_multiplies_as_told_until_the_run_is_over(precision, allowed, before):
    with products(CUDA, precision):
        assert flags() == (allowed, allowed)
    assert flags() == before
    with pytest.raises(LookupError), products(CUDA, precision):
        raise LookupError
    assert flags() == before


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("device", [CPU, MPS])
def test_another_device_leaves_the_flags_alone(device, precision, before):
    with products(device, precision):
        assert flags() == before
    assert flags() == before


def test_a_run_on_a_cpu_leaves_the_flags_alone(before):
    with accelerator_for("cpu", "fp32") as accelerator:
        assert flags() == before
        assert accelerator.mixed_precision == "no"


def test_tf32_is_the_default_and_on_a_cpu_the_same_bytes_as_fp32(tiny, run_folder, tmp_path):
    assert training_config(compose([])).training.precision == "tf32"
    settings = [*tiny, f"outputs={tmp_path}", "runtime.device=cpu"]
    runs = [run([*settings, f"training.precision={name}"]).path for name in ("fp32", "tf32")]
    assert runs[0] != runs[1]  # on a GPU they differ
    for file in ("model.safetensors", "ema.safetensors"):
        fp32, tf32 = (checkpoint.find(path / "checkpoints").folder / file for path in runs)
        assert fp32.read_bytes() == tf32.read_bytes()
    fp32, tf32 = ((path / "metrics.jsonl").read_bytes() for path in runs)
    assert fp32 == tf32 == (run_folder / "metrics.jsonl").read_bytes()
