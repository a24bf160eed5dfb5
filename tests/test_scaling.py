import pytest

from ddpm.plan.sizes import expected_speed


def test_one_device_is_as_fast_as_it_was_measured():
    assert expected_speed(300.0, 1, 128, 10**9, 1.0) == pytest.approx(300)


def test_an_exchange_that_the_backward_pass_hides_costs_nothing():
    assert expected_speed(100.0, 8, 128, 10**8, 1e11) == pytest.approx(800)


def test_what_it_does_not_hide_is_waited_for():
    # 4 devices with 10 images each at 100 images/s: 0.1 s, two thirds of it backward;
    # the exchange of 2 * 3/4 * 1 GB at 10 GB/s: 0.15 s
    assert expected_speed(100.0, 4, 40, 10**9, 1e10) == pytest.approx(
        40 / (0.1 + 0.15 - 0.1 * 2 / 3)
    )
