"""Precision: set for all of torch, restored afterwards, and named with each figure.

On a CPU, tf32 gives the same bytes as fp32.
"""

import json

import pytest
import torch
from torch import nn

from ddpm import run
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.diffusion import samplers
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.schedules import linear
from ddpm.runs import checkpoint, results
from ddpm.sample.drawing import Drawing
from ddpm.sample.folder import claim_folder, word_for
from ddpm.system.files import short_hash
from ddpm.system.precision import deterministic, in_words, products
from ddpm.system.processes import accelerator_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MATMUL, CUDNN, ONEDNN = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
NEW = [MATMUL, CUDNN, CUDNN.conv, CUDNN.rnn, ONEDNN.matmul, ONEDNN.conv, ONEDNN.rnn]


def old_flags():
    return MATMUL.allow_tf32, CUDNN.allow_tf32, torch.get_float32_matmul_precision()


def new_knobs():
    return [owner.fp32_precision for owner in NEW]


@pytest.fixture(
    params=[
        *[("highest", False, None), ("highest", True, None), ("high", True, None)],
        *[("medium", False, None), ("highest", True, "tf32"), ("high", True, "ieee")],
    ]
)
def before(request):
    """Sets torch's flags as a caller may have left them: the old ones and the new global one."""
    matmul, cudnn, everything = request.param
    kept = torch.get_float32_matmul_precision(), CUDNN.allow_tf32, torch.backends.fp32_precision
    torch.set_float32_matmul_precision(matmul)
    CUDNN.allow_tf32 = cudnn
    if everything is not None:
        torch.backends.fp32_precision = everything
    yield
    torch.backends.fp32_precision = kept[2]
    torch.set_float32_matmul_precision(kept[0])
    CUDNN.allow_tf32 = kept[1]


@pytest.mark.parametrize(
    ("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True), ("fp16", True)]
)
def test_torch_multiplies_as_told_until_it_is_over(precision, allowed, before):
    known = new_knobs()
    with products(precision):
        assert new_knobs() == [*["tf32" if allowed else "ieee"] * 4, *["ieee"] * 3]
        if torch.backends.fp32_precision == "none":  # otherwise torch refuses to report one
            assert old_flags() == (allowed, allowed, "high" if allowed else "highest")
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (allowed, allowed)
    assert new_knobs() == known
    with pytest.raises(LookupError), products(precision):
        raise LookupError
    assert new_knobs() == known


def test_products_on_a_cpu_are_float32s_whatever_torch_was_told(before):
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    with products("tf32"):
        found = a @ b
    assert (found - (a.double() @ b.double()).float()).abs().max() < 1e-4


def test_the_compiler_can_ask_for_the_flags(before):
    with products("fp32"):
        torch._dynamo.reset()
        assert torch.equal(
            torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)), 2 * torch.ones(2)
        )


def test_a_gpu_is_deterministic_only_where_asked_and_only_so_long(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def set_now():
        return torch.are_deterministic_algorithms_enabled(), CUDNN.deterministic

    with deterministic(CUDA, False), deterministic(CPU, True):
        assert set_now() == (False, False)
    with deterministic(CUDA, True):
        assert set_now() == (True, True)
        assert not CUDNN.benchmark
    assert set_now() == (False, False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:0:0"), deterministic(CUDA, True):
        pass


def test_what_a_run_computes_in_is_said_in_words():
    assert in_words(CPU, "tf32", False) == "float32; the same bits each time"
    assert in_words(CUDA, "fp32", True) == "float32; the same bits each time"
    assert in_words(CUDA, "bf16", False) == (
        "bf16 by autocast, the rest in float32 with products in TF32; the same to rounding"
    )


def test_tf32_is_the_default_and_on_a_cpu_the_same_bytes_as_fp32(tiny, run_folder, tmp_path):
    assert training_config(compose([])).training.precision == "tf32"
    settings = [*tiny, f"outputs={tmp_path}", "runtime.device=cpu"]
    runs = [run([*settings, f"training.precision={name}"]).path for name in ("fp32", "tf32")]
    assert runs[0] != runs[1]  # two runs, because on a GPU they differ
    for file in ("model.safetensors", "ema.safetensors"):
        fp32, tf32 = (checkpoint.find(path / "checkpoints").folder / file for path in runs)
        assert fp32.read_bytes() == tf32.read_bytes()
    fp32, tf32 = ((path / "metrics.jsonl").read_bytes() for path in runs)
    assert fp32 == tf32 == (run_folder / "metrics.jsonl").read_bytes()
    (start,) = json.loads((runs[0] / "run.json").read_text())["starts"]
    assert start["arithmetic"] == "float32; the same bits each time"


class Seen(nn.Module):
    """A layer that records the dtype of each of its outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.dtypes = []

    def forward(self, x_t, t):
        out = self.layer(x_t)
        self.dtypes.append(out.dtype)
        return out


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_images_are_drawn_in_the_precision_asked_for_and_are_float32(precision, dtype):
    net = Seen()
    diffusion = GaussianDiffusion(linear(1000, 1e-4, 0.02))
    sampler = samplers.Sampler(samplers.ddim, num_steps=2)
    drawn = Drawing(net, diffusion, sampler, (1, 4, 4), seed=0, precision=precision).images([0])
    assert net.dtypes == [dtype] * 2
    assert drawn.dtype == torch.float32
    assert net.training  # the mode is restored


def test_measures_in_training_take_their_own_precision_and_not_the_trainings():
    """Previews and metrics call the network's own forward, so it must not enter autocast.

    Accelerate replaces that forward with one that does.
    """
    from ddpm.train.start import prepare

    config = training_config(compose(["training.precision=bf16", "runtime.device=cpu"]))
    with accelerator_for("cpu", "bf16") as accelerator:
        net = Seen()
        state = prepare(config, accelerator, GaussianDiffusion(linear(10, 1e-4, 0.02)), net)
        net(torch.zeros(1, 1, 4, 4), torch.zeros(1))
        with accelerator.autocast():
            state.model(torch.zeros(1, 1, 4, 4), torch.zeros(1))
    assert net.dtypes == [torch.float32, torch.bfloat16]


def test_figures_of_unlike_precision_are_two_and_those_of_before_are_tf32s(tmp_path):
    file, protocol = tmp_path / "evaluation.json", {"count": 8, "step": 1}
    old = {
        "id": "fd@8:step1",
        "metric": "fd",
        "value": 3.0,
        "protocol": protocol,
        "deviation": None,
    }
    file.write_text(json.dumps([old]))
    bf16 = results.Measurement("fd", 2.0, {**protocol, "precision": "bf16"})
    tf32 = results.Measurement("fd", 1.0, {**protocol, "precision": "tf32"})
    results.record(file, [bf16, tf32])
    found = {entry["id"]: entry["value"] for entry in results.read_measurements(file)}
    assert found == {"fd@8:step1": 1.0, "fd@8:bf16:step1": 2.0}


def test_a_folder_of_images_of_before_is_carried_on_in_tf32_alone(tmp_path):
    protocol = {"seed": 0, "classes": None}
    claim_folder(tmp_path, protocol)
    claim_folder(tmp_path, {**protocol, "precision": "tf32"})
    with pytest.raises(ValueError, match="precision=tf32, not bf16"):
        claim_folder(tmp_path, {**protocol, "precision": "bf16"})
    assert short_hash(protocol) == word_for(protocol) == word_for({**protocol, "precision": "tf32"})
    assert word_for(protocol) != word_for({**protocol, "precision": "fp32"})
