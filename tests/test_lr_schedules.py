import pytest
import torch
from hydra.utils import instantiate
from torch.optim.lr_scheduler import CosineAnnealingLR

from ddpm.config.compose import shipped_option, shipped_options
from ddpm.train.lr_schedules import Constant, Cosine


def test_constant_rises_linearly_from_0_over_the_warm_up_and_then_stays():
    schedule = Constant(warmup_steps=5000)
    rates = [schedule(step, 800_000, 2e-4) for step in (0, 1, 2500, 5000, 799_999)]
    assert rates == pytest.approx([0, 2e-4 / 5000, 1e-4, 2e-4, 2e-4])


def test_without_warm_up_the_first_update_has_the_full_rate():
    assert Constant(warmup_steps=0)(0, 10, 2e-4) == 2e-4
    assert Cosine(warmup_steps=0, final_lr=0.0)(0, 10, 2e-4) == 2e-4


def test_cosine_is_torchs_cosine_annealing():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    theirs = CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-9)
    schedule = Cosine(warmup_steps=0, final_lr=1e-9)
    for step in range(50):
        assert schedule(step, 50, 2e-4) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_cosine_warms_up_then_passes_halfway_between_its_ends_and_reaches_the_final_rate():
    schedule = Cosine(warmup_steps=100, final_lr=2e-5)
    rates = [schedule(step, 1100, 1e-3) for step in (0, 50, 100, 600, 1100)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, (1e-3 + 2e-5) / 2, 2e-5])


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: Constant(warmup_steps=-1), "warmup_steps=-1"),
        (lambda: Cosine(warmup_steps=-1, final_lr=0.0), "warmup_steps=-1"),
        (lambda: Cosine(warmup_steps=0, final_lr=-1e-9), "final_lr=-1e-09"),
    ],
)
def test_negative_arguments_are_refused_by_name(call, argument):
    with pytest.raises(ValueError, match=argument):
        call()


@pytest.mark.parametrize("option", shipped_options("lr_schedule"))
def test_each_shipped_schedule_is_built_and_stays_within_0_and_the_rate(option):
    schedule = instantiate(shipped_option("lr_schedule", option))
    rates = [schedule(step, 10_000, 2e-4) for step in range(0, 10_001, 100)]
    assert min(rates) >= 0
    assert max(rates) == pytest.approx(2e-4)
