import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpm.train.state import EMA


def changing(seed: int = 0) -> tuple[nn.Module, torch.Generator]:
    """Returns a module with float and integer buffers, and a generator to change its weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.Generator().manual_seed(seed)


@torch.no_grad()
def change(module: nn.Module, generator: torch.Generator) -> None:
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    module(torch.randn(8, 3, dtype=parameter.dtype))  # moves the buffers


def test_with_constant_decay_the_average_is_torchs_own():
    module, generator = changing()
    ema = EMA(module, decay=0.9, warmup=False)
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(module)  # the first call only copies
    for _ in range(10):
        change(module, generator)
        ema.update()
        theirs.update_parameters(module)
    for name, expected in theirs.module.named_parameters():
        torch.testing.assert_close(ema.state_dict()[name], expected.detach())


def test_warm_up_forgets_the_first_weights_as_one_over_n_plus_9_choose_9():
    """After weights jump from 0 to 1, the 0 keeps a share: the product of (1 + k) / (10 + k)."""
    module = nn.Linear(1, 1)
    nn.init.zeros_(module.weight)
    ema = EMA(module, decay=0.9999, warmup=True)
    nn.init.ones_(module.weight)
    for n in range(1, 30):
        ema.update()
        assert ema.state_dict()["weight"].item() == pytest.approx(
            1 - 1 / math.comb(n + 9, 9), abs=1e-6
        )


def test_warm_up_ends_at_the_decay_asked_for():
    ema = EMA(nn.Linear(1, 1), decay=0.5, warmup=True)
    assert [ema.decay_at(update) for update in (0, 7, 8, 1000)] == pytest.approx(
        [1 / 10, 8 / 17, 0.5, 0.5]
    )


def test_the_average_starts_as_a_copy_that_does_not_follow_the_module():
    module, generator = changing()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ema = EMA(module, decay=0.9, warmup=False)
    change(module, generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.state_dict().items())


def test_buffers_are_those_of_the_module_at_the_last_update():
    module, generator = changing()
    ema = EMA(module, decay=0.9, warmup=False)
    for _ in range(3):
        change(module, generator)
        ema.update()
    assert ema.state_dict()["1.num_batches_tracked"] == 3
    assert torch.equal(ema.state_dict()["1.running_mean"], module.state_dict()["1.running_mean"])


def test_the_average_of_bfloat16_weights_keeps_steps_that_bfloat16_cannot_hold():
    module = nn.Linear(1, 1).bfloat16()
    nn.init.ones_(module.weight)
    ema = EMA(module, decay=0.999, warmup=False)
    nn.init.constant_(module.weight, 2.0)
    ema.update()
    assert ema.state_dict()["weight"].dtype == torch.float32
    assert ema.state_dict()["weight"].item() == pytest.approx(1.001)


def test_a_bare_module_loads_the_average():
    module, generator = changing()
    ema = EMA(module, decay=0.9, warmup=True)
    change(module, generator)
    ema.update()
    bare, _ = changing(seed=1)
    bare.load_state_dict(ema.state_dict())
    assert torch.equal(bare.state_dict()["0.weight"], ema.state_dict()["0.weight"])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_no_share_is_refused(decay):
    with pytest.raises(ValueError, match=f"ema_decay={decay}"):
        EMA(nn.Linear(1, 1), decay, warmup=False)
