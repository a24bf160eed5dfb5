"""Drawing images from a network: which weights, which images of which classes, in which batches."""

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
from ddpm.system.signals import at_once


@dataclass(frozen=True)
class Drawing:
    """A network with all that decides its images.

    Image i is a function of this, of i and of its class, whatever it is batched with.

    Attributes:
        network: With the weights that draw.
        diffusion: The process that the network was trained for.
        sampler: How images are drawn.
        shape: (C, H, W) of an image.
        seed: Of all the noise.
        any_class: The class number that stands for "any" in classifier-free guidance; None if the
            network has not learned one.
        precision: What the network computes in. The rest of a step is float32.
        forward: What is called in the network's place, and gives the same (ways.of_batch); None:
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
                "trained with classes, some of them left out "
                "(training.conditional=true training.label_dropout=0.1)"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights lie, and so where images are drawn."""
        return next(self.network.parameters()).device

    @property
    def timesteps(self) -> list[int]:
        """The timesteps that the sampler visits, from the noisiest down."""
        return self.sampler.timesteps(self.diffusion)

    def latents(self, indices: Sequence[int]) -> Tensor:
        """Returns the noise that the images with these indices start from: (B, C, H, W) float32."""
        return latents(self.shape, indices, self.seed, self.device)

    def images(self, indices: Sequence[int], classes: Sequence[int] | None = None) -> Tensor:
        """Draws the images with these indices.

        Args:
            indices: The numbers of the images.
            classes: One an index; None for a network without.

        Returns:
            (B, C, H, W) float32 in [-1, 1].

        Raises:
            torch.OutOfMemoryError: If one image does not fit the device's memory.
        """
        return self.walk(self.latents(indices), self.timesteps, self._noise(indices), classes)

    def chains(
        self, indices: Sequence[int], classes: Sequence[int] | None, kept: set[int]
    ) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor]:
        """Draws images, and keeps what their chains were like at some timesteps.

        Args:
            indices: The numbers of the images.
            classes: One an index; None for a network without.
            kept: The timesteps.

        Returns:
            For each timestep kept (x_t, x0_hat), each (B, C, H, W); and the images as `images`
            draws them.
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

        Images that do not fit the device's memory together are drawn in halves.

        Args:
            x: x_t, (B, C, H, W).
            timesteps: To visit, from the noisiest down.
            noise: See ddpm.diffusion.samplers.
            classes: One an image; None for a network without.

        Returns:
            Images like x, in [-1, 1].

        Raises:
            torch.OutOfMemoryError: If one image does not fit the device's memory.
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
        with self.computing(), at_once(), torch.inference_mode():  # a call may compile for minutes
            # a copy made here is of inference mode as all that follow, and needs no code of its own
            return self.sampler.walk(
                self.model(of_batch), self.diffusion, x.clone(), timesteps, noise, watch
            )

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Has the network compute as drawing does: without dropout, in this precision."""
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
        """Returns (x_t, t) -> output, guided as the sampler says; for use within `computing`.

        Args:
            classes: (B,) int64; None for a network without.
        """

        forward = self.forward or self.network

        def model(x_t: Tensor, t: Tensor) -> Tensor:
            return forward(x_t, t) if classes is None else forward(x_t, t, classes)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            """Ho & Salimans 2022, Eq. 6, scale 1 + w; a learned variance stays the class's."""
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
