import pytest
import torch
from accelerate import Accelerator

from ddpm.train.loop import is_due, micro_batches
from ddpm.train.meter import Meter

CPU = torch.device("cpu")


def test_what_is_done_every_so_many_steps_is_done_at_multiples_and_at_the_last_step():
    assert [step for step in range(1, 12) if is_due(step, every=4, last=11)] == [4, 8, 11]
    assert [step for step in range(1, 9) if is_due(step, every=4, last=8)] == [4, 8]
    assert [step for step in range(1, 4) if is_due(step, every=100, last=3)] == [3]


@pytest.mark.parametrize("batch_size", [7, 128])
@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("device_batch", [1, 5, None])
def test_the_parts_of_a_batch_are_its_positions_in_order_fairly_shared(
    batch_size, num_processes, device_batch
):
    shares = [
        micro_batches(batch_size, num_processes, process, device_batch)
        for process in range(num_processes)
    ]
    assert [
        position for share in shares for start, stop in share for position in range(start, stop)
    ] == list(range(batch_size))
    sizes = [share[-1][1] - share[0][0] for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert max(stop - start for share in shares for start, stop in share) <= (
        device_batch or batch_size
    )


def test_a_batch_is_taken_in_as_few_parts_as_fit():
    assert micro_batches(8, 1, 0, 3) == [(0, 3), (3, 6), (6, 8)]
    assert micro_batches(8, 1, 0, None) == micro_batches(8, 1, 0, 100) == [(0, 8)]


def test_fewer_images_than_processes_are_refused():
    with pytest.raises(ValueError, match="2 images .* 3 processes"):
        micro_batches(2, 3, 0, None)


def test_the_meters_means_are_those_of_everything_since_the_last_report():
    t, losses = (
        torch.tensor([0, 249, 250, 600, 740, 0]),
        torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    )
    meter, optimizer = (
        Meter(1000, Accelerator(cpu=True)),
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]),
    )
    for update, part in enumerate((slice(0, 2), slice(2, 6))):
        meter.add_losses(losses[part], t[part])
        meter.add_norm(update, losses[part].sum(), optimizer)
    # no timestep is in the last quartile
    expected = {
        "train/loss": 3.5,
        "train/loss_q0": 3.0,
        "train/loss_q1": 3.0,
        "train/loss_q2": 4.5,
        "train/grad_norm": 10.5,
    }
    assert meter.means() == pytest.approx(expected)
    meter.reset()
    meter.add_losses(torch.tensor([7.0]), torch.tensor([999]))
    meter.add_norm(2, torch.tensor(2.0), optimizer)
    assert meter.means() == pytest.approx(
        {"train/loss": 7.0, "train/loss_q3": 7.0, "train/grad_norm": 2.0}
    )
