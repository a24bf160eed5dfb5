"""Draws images from a network: with which weights, of which classes, in which batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm.diffusion.process import GaussianDiffusion, Model
from ddpm.diffusion.samplers import Noise, Sampler, Watch, latents, step_noise
from ddpm.system import precision
from ddpm.system.devices import halve_to_fit
from ddpm.system.names import Precision
from ddpm.system.signals import at_once, check


@dataclass(frozen=True)
class Drawing:
    """A network with everything that decides its images.

    Image i depends only on this, on i and on its class, not on the rest of its batch.

    Attributes:
        network: The network, with the weights to draw with.
        diffusion: The process that the network was trained for.
        sampler: The sampler.
        shape: (C, H, W) of an image.
        seed: Seed of all noise.
        any_class: The class number that stands for "any" in classifier-free guidance; None if the
            network has not learned one.
        precision: The precision that the network computes in. The rest of a step is float32.
        forward: Called instead of the network, with the same results (ways.of_batch). None calls
            the network.

    Raises:
        ValueError: If the sampler asks for guidance and any_class is None.
    """

    network: nn.Module
    diffusion: GaussianDiffusion
    sampler: Sampler
    shape: tuple[int, int, int]
    seed: int
    any_class: int | None = None
    precision: Precision = "tf32"
    forward: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if self.sampler.guidance_scale != 1 and self.any_class is None:
            raise ValueError(
                f"sampler.guidance_scale={self.sampler.guidance_scale} needs a network that was "
                "trained with classes and label dropout "
                "(training.conditional=true training.label_dropout=0.1)"
            )

    @property
    def device(self) -> torch.device:
        """The device of the weights, on which images are drawn."""
        return next(self.network.parameters()).device

    @property
    def timesteps(self) -> list[int]:
        """The timesteps that the sampler visits, from the noisiest down."""
        return self.sampler.timesteps(self.diffusion)

    def latents(self, indices: Sequence[int]) -> Tensor:
        """Returns the initial noise of the images with these indices: (B, C, H, W) float32."""
        return latents(self.shape, indices, self.seed, self.device)

    def images(self, indices: Sequence[int], classes: Sequence[int] | None = None) -> Tensor:
        """Draws the images with these indices.

        Args:
            indices: Indices of the images.
            classes: One class per index; None for a network without classes.

        Returns:
            (B, C, H, W) float32 in [-1, 1].

        Raises:
            torch.OutOfMemoryError: If even one image does not fit in the device's memory.
        """
        return self.walk(self.latents(indices), self.timesteps, self._noise(indices), classes)

    def chains(
        self, indices: Sequence[int], classes: Sequence[int] | None, kept: set[int]
    ) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor]:
        """Draws images and records their chains at some timesteps.

        Args:
            indices: Indices of the images.
            classes: One class per index; None for a network without classes.
            kept: Timesteps to record.

        Returns:
            (x_t, x0_hat), each (B, C, H, W), by recorded timestep; and the images as `images` draws
            them.
        """

        def part(span: slice) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor]:
            seen: dict[int, tuple[Tensor, Tensor]] = {}

            def watch(t: int, x_t: Tensor, x0_hat: Tensor) -> None:
                if t in kept and t not in seen:
                    seen[t] = x_t.clone(), x0_hat.clone()

            some, chosen = indices[span], None if classes is None else classes[span]
            x, noise = self.latents(some), self._noise(some)
            return seen, self._walk(x, self.timesteps, noise, chosen, watch)

        parts = halve_to_fit(part, len(indices))
        chains = {}
        for t in parts[0][0]:
            x_t, x0_hat = zip(*(seen[t] for seen, _ in parts), strict=True)
            chains[t] = torch.cat(x_t), torch.cat(x0_hat)
        return chains, torch.cat([drawn for _, drawn in parts])

    def walk(
        self,
        x: Tensor,
        timesteps: Sequence[int],
        noise: Noise,
        classes: Sequence[int] | None = None,
    ) -> Tensor:
        """Walks from x_t at timesteps[0] to images.

        A batch that does not fit in the device's memory is drawn in halves.

        Args:
            x: x_t, (B, C, H, W).
            timesteps: Timesteps to visit, from the noisiest down.
            noise: See ddpm.diffusion.samplers.
            classes: One class per image; None for a network without classes.

        Returns:
            Images like x, in [-1, 1].

        Raises:
            torch.OutOfMemoryError: If even one image does not fit in the device's memory.
        """

        def part(span: slice) -> Tensor:
            chosen = None if classes is None else classes[span]
            return self._walk(x[span], timesteps, lambda t: noise(t)[span], chosen)

        parts = halve_to_fit(part, len(x))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _noise(self, indices: Sequence[int]) -> Noise:
        return step_noise(self.shape, indices, self.seed, self.device)

    def _walk(
        self,
        x: Tensor,
        timesteps: Sequence[int],
        noise: Noise,
        classes: Sequence[int] | None,
        watch: Watch | None = None,
    ) -> Tensor:
        of_batch = None if classes is None else torch.tensor(list(classes), device=self.device)
        model = self.model(of_batch)

        def interruptible(x_t: Tensor, t: Tensor) -> Tensor:
            check()
            return model(x_t, t)

        with self.computing(), at_once(), torch.inference_mode():  # a call may compile for minutes
            # the clone is an inference tensor like all that follow, so torch compiles only once
            return self.sampler.walk(
                interruptible, self.diffusion, x.clone(), timesteps, noise, watch
            )

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Makes the network compute as in drawing: without dropout, in this precision."""
        was_training = self.network.training
        self.network.eval()
        try:
            with (
                precision.products(self.precision),
                precision.autocast(self.device, self.precision),
            ):
                yield
        finally:
            self.network.train(was_training)

    def model(self, classes: Tensor | None) -> Model:
        """Returns (x_t, t) -> output with the sampler's guidance, for use within `computing`.

        Args:
            classes: (B,) int64; None for a network without classes.
        """
        forward = self.forward or self.network

        def model(x_t: Tensor, t: Tensor) -> Tensor:
            return forward(x_t, t) if classes is None else forward(x_t, t, classes)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            """Applies Ho & Salimans 2022, Eq. 6, scale 1 + w; keeps the class's own variance."""
            assert classes is not None
            both = torch.cat([classes, torch.full_like(classes, self.any_class or 0)])
            output = forward(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
            with_class, without = output.to(x_t.dtype).chunk(2)
            channels = self.shape[0]
            prediction = without[:, :channels] + self.sampler.guidance_scale * (
                with_class[:, :channels] - without[:, :channels]
            )
            return torch.cat([prediction, with_class[:, channels:]], dim=1)

        return model if self.sampler.guidance_scale == 1 else guided
