"""What ddpm.benchmark times beside the training step: a sampler step, and waits for the device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.diffusion.samplers import step_noise
from ddpm.sample.subject import of_config
from ddpm.system.devices import wait_for


class SamplerStep:
    """A run's own sampler, from the noisiest timestep on, with all the work around the network.

    Args:
        config: The run's configuration.
        device: The device to draw on.
        batch: Images at once.
    """

    def __init__(self, config: Config, device: torch.device, batch: int) -> None:
        num_classes = config.data.num_classes or 1
        network = build.network(config, device, num_classes)
        classes = [str(number) for number in range(num_classes)]
        self.subject = subject = of_config(
            config, classes, lambda device: network, network.state_dict
        )
        sampler = build.sampler(config.sampler, subject.diffusion)
        precision = config.training.precision
        self.drawing = subject.drawing(sampler, config.seed, device, precision)
        self._noise = self.drawing.latents(range(batch))
        self._step_noise = step_noise(subject.shape, range(batch), config.seed, device)
        self.classes = subject.classes_in_turn(batch)

    def run(self, count: int) -> None:
        """Makes `count` sampler steps and waits for the last."""
        timesteps = self.drawing.timesteps[:count]
        self.drawing.walk(self._noise, timesteps, self._step_noise, self.classes)
        wait_for(self.drawing.device)


class HostWaits(TorchDispatchMode):
    """Counts, in `count`, the operations that make the host wait for the device.

    They read a number, or copy a tensor to the host's memory.
    """

    READS = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.equal,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
    )
    COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.READS:
            self.count += 1
        elif func.overloadpacket in self.COPIES:
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            self.count += source.device.type != "cpu" and out.device.type == "cpu"
        return out
