"""What several devices are worth: images/s expected from one device's speed and the bytes of the gradients."""

BACKWARD_SHARE = 2 / 3  # of a training step: the backward pass has twice the products of the forward one


def expected_speed(speed: float, devices: int, batch_size: int, gradient_bytes: int, bandwidth: float) -> float:
    """Images/s of `devices` devices that share a global batch, from the images/s of one.

    bandwidth: bytes/s that a device sends while all do. A ring all-reduce sends 2 (n - 1) / n of the gradients from each device; what the backward pass
    takes longer than that hides it. Assumes that a device is as fast with its share of the batch as with what `speed` was measured with, that all are
    equally fast, and no latency: an upper bound where shares are small.
    """
    computing = batch_size / devices / speed
    exchanging = 2 * (devices - 1) / devices * gradient_bytes / bandwidth
    return batch_size / (computing + max(0.0, exchanging - BACKWARD_SHARE * computing))
