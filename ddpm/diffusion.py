"""Gaussian diffusion: the forward process, its posterior, the predictions and the training loss. Knows no network and no data."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> output


class Denoised(NamedTuple):
    """What a model says about x_t: estimates of the clean image and of the noise, both of the shape of x_t."""

    x0_hat: Tensor
    eps_hat: Tensor


class GaussianDiffusion:
    """Forward process q, its posterior, and L_simple (Ho et al. 2020).

    betas: (T,) float64, each in (0, 1).    prediction: what the model outputs, the noise ("epsilon") or v = sqrt(abar) epsilon - sqrt(1 - abar) x0
    (Salimans & Ho 2022, App. D).    variance: of the reverse step, beta_t ("fixed_large") or the posterior's ("fixed_small"; Ho et al. 2020,
    section 3.2).    Constants are float64 and cast to the image's dtype where they are used.
    Raises ValueError if betas is not such a list.
    """

    def __init__(
        self,
        betas: Tensor,
        prediction: Literal["epsilon", "v"] = "epsilon",
        variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
    ) -> None:
        betas = betas.double()
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be a list of at least 2 numbers between 0 and 1")
        self.prediction = prediction
        self.variance = variance
        self.num_timesteps = len(betas)
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t from q(x_t | x_0) in one jump (Ho et al. 2020, Eq. 4).

        x0: (B, C, H, W) float, in [-1, 1].    t: (B,) int64, in [0, T-1].    noise: like x0, standard normal.
        Returns x_t, shape and dtype of x0.    Raises ValueError if noise or t has the wrong shape.
        """
        if noise.shape != x0.shape or t.shape != x0.shape[:1]:
            raise ValueError(f"x0 {tuple(x0.shape)} needs noise of that shape and t ({len(x0)},), got {tuple(noise.shape)} and {tuple(t.shape)}")
        signal, sigma = self._signal_and_sigma(t, x0)
        return signal * x0 + sigma * noise

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq. 7).    x0, x_t: (B, C, H, W).    t: (B,) int64, in [0, T-1]."""
        return self._at(t, "mean_of_x0", x0) * x0 + self._at(t, "mean_of_x_t", x_t) * x_t

    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0) for each t (Ho et al. 2020, Eq. 7): (T,) float64, 0 at t = 0."""
        return self.betas * (1 - self._alphas_cumprod_before()) / (1 - self.alphas_cumprod)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should output at x_t = q_sample(x0, t, noise).    Shapes of q_sample."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._signal_and_sigma(t, x0)
        return signal * noise - sigma * x0

    def denoised(self, output: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        """The model's output as estimates of x0 (Ho et al. 2020, Eq. 15) and of the noise.    output, x_t: (B, C, H, W).    t: (B,) int64."""
        signal, sigma = self._signal_and_sigma(t, x_t)
        if self.prediction == "epsilon":
            return Denoised((x_t - sigma * output) / signal, output)
        return Denoised(signal * x_t - sigma * output, sigma * x_t + signal * output)

    def denoiser(self, model: Model, clip: bool = True) -> Callable[[Tensor, Tensor], Denoised]:
        """The function (x_t, t) -> Denoised that samplers walk with.

        clip: hold x0_hat in [-1, 1], as the authors' code does when it samples, and make eps_hat agree with it (Eq. 15 solved for epsilon).
        """

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            estimate = self.denoised(model(x_t, t).to(x_t.dtype), x_t, t)
            if not clip:
                return estimate
            signal, sigma = self._signal_and_sigma(t, x_t)
            x0_hat = estimate.x0_hat.clamp(-1, 1)
            return Denoised(x0_hat, (x_t - signal * x0_hat) / sigma)

        return denoise

    def losses(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """L_simple of each image: mean squared error over its elements (Ho et al. 2020, Eq. 14).    Shapes of q_sample.    Returns (B,) float32 or wider."""
        output = model(self.q_sample(x0, t, noise), t)
        error = output.to(x0.dtype) - self.target(x0, noise, t)
        return error.square().flatten(1).mean(dim=1)

    def _alphas_cumprod_before(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    def _signal_and_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._at(t, "signal", like), self._at(t, "sigma", like)

    def _at(self, t: Tensor, name: str, like: Tensor) -> Tensor:
        """Row t of a table in the dtype and on the device of `like`, (B, 1, 1, 1). Tables are made once for each device and dtype."""
        key = (name, like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self._table(name).to(device=like.device, dtype=like.dtype)
        return self._tables[key][t].reshape(-1, 1, 1, 1)

    def _table(self, name: str) -> Tensor:
        abar, before = self.alphas_cumprod, self._alphas_cumprod_before()
        if name == "signal":
            return abar.sqrt()
        if name == "sigma":
            return (1 - abar).sqrt()
        if name == "mean_of_x0":
            return before.sqrt() * self.betas / (1 - abar)
        assert name == "mean_of_x_t", name
        return (1 - self.betas).sqrt() * (1 - before) / (1 - abar)
