"""Drawing images from a network: which weights, which images of which classes, in which batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddpm.diffusion.process import GaussianDiffusion, Model
from ddpm.diffusion.samplers import Noise, Sampler, Watch, latents, step_noise


@dataclass(frozen=True)
class Drawing:
    """A network with all that decides its images: image i is a function of this, of i and of its class, whatever it is batched with.

    weights: used in place of the network's own, which stay as they are.    shape: (C, H, W).    any_class: the class number that stands for "any" in
    classifier-free guidance, None if the network has not learned one.    Raises ValueError if the sampler asks for guidance without it.
    """

    network: nn.Module
    weights: dict[str, Tensor]
    diffusion: GaussianDiffusion
    sampler: Sampler
    shape: tuple[int, int, int]
    seed: int
    any_class: int | None = None

    def __post_init__(self) -> None:
        if self.sampler.guidance_scale != 1 and self.any_class is None:
            raise ValueError(
                f"sampler.guidance_scale={self.sampler.guidance_scale} needs a network that was trained with classes, some of them left out "
                "(training.conditional=true training.label_dropout=0.1)"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights lie, and so where images are drawn."""
        return next(iter(self.weights.values())).device

    @property
    def timesteps(self) -> list[int]:
        """The timesteps that the sampler visits, from the noisiest down."""
        return self.sampler.timesteps(self.diffusion)

    def latents(self, indices: Sequence[int]) -> Tensor:
        """The noise that the images with these indices start from: (B, C, H, W) float32."""
        return latents(self.shape, indices, self.seed, self.device)

    def images(
        self,
        indices: Sequence[int],
        classes: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """The images with these indices: (B, C, H, W) float32 in [-1, 1].    classes: one an index, None for a network without.

        Drawn in halves where they do not fit the device's memory together, unless somebody watches.    Raises torch.OutOfMemoryError for one too many.
        """
        try:
            return self.walk(
                self.latents(indices),
                self.timesteps,
                step_noise(self.shape, indices, self.seed, self.device),
                classes,
                watch,
            )
        except torch.OutOfMemoryError:
            if len(indices) == 1 or watch is not None:
                raise
        if (
            torch.cuda.is_available()
        ):  # outside the except block, where the error would still hold the tensors
            torch.cuda.empty_cache()
        half = len(indices) // 2
        return torch.cat(
            [
                self.images(indices[part], None if classes is None else classes[part])
                for part in (slice(half), slice(half, None))
            ]
        )

    def walk(
        self,
        x: Tensor,
        timesteps: Sequence[int],
        noise: Noise,
        classes: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """From x_t at timesteps[0], (B, C, H, W), to images.    noise, watch: see ddpm/samplers.py.    Returns like x, in [-1, 1]."""
        was_training = self.network.training
        self.network.eval()
        try:
            of_batch = None if classes is None else torch.tensor(list(classes), device=self.device)
            return self.sampler.walk(
                self.model(of_batch), self.diffusion, x, timesteps, noise, watch
            )
        finally:
            self.network.train(was_training)

    def model(self, classes: Tensor | None) -> Model:
        """(x_t, t) -> output, with these weights, guided as the sampler says, in the network's present mode.    classes: (B,) int64, None without."""

        def model(x_t: Tensor, t: Tensor) -> Tensor:
            return functional_call(
                self.network, self.weights, (x_t, t) if classes is None else (x_t, t, classes)
            )

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            """Ho & Salimans 2022, Eq. 6, with scale 1 + w; a learned variance stays that of the class."""
            assert classes is not None
            both = torch.cat([classes, torch.full_like(classes, self.any_class or 0)])
            with_class, without = functional_call(
                self.network, self.weights, (torch.cat([x_t, x_t]), torch.cat([t, t]), both)
            ).chunk(2)
            channels = self.shape[0]
            prediction = without[:, :channels] + self.sampler.guidance_scale * (
                with_class[:, :channels] - without[:, :channels]
            )
            return torch.cat([prediction, with_class[:, channels:]], dim=1)

        return model if self.sampler.guidance_scale == 1 else guided
