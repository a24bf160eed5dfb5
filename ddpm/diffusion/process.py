"""Gaussian diffusion: the forward process, its posterior, predictions and losses.

It knows nothing about networks or data.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> output
Prediction = Literal["epsilon", "x0", "v", "mean"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
Loss = Literal["simple", "min_snr", "bound", "hybrid"]


class Denoised(NamedTuple):
    """A model's estimates at x_t, each with the shape of x_t.

    Attributes:
        x0_hat: Estimate of the clean image.
        eps_hat: Estimate of the noise.
        variance_output: The model's raw variance output; None if the variance is fixed.
    """

    x0_hat: Tensor
    eps_hat: Tensor
    variance_output: Tensor | None = None


class DenoisedMean(Denoised):
    """Estimates of a model that predicts the mean of x_{t-1} directly.

    Attributes:
        mean: The predicted mean, shaped like x_t and never clipped.
    """

    mean: Tensor

    @classmethod
    def of(cls, estimate: Denoised, mean: Tensor) -> "DenoisedMean":
        """Returns the estimate together with the predicted mean."""
        found = cls(*estimate)
        found.mean = mean
        return found


class GaussianDiffusion:
    """Forward process q, its posterior, predictions and losses.

    Ho et al. 2020; Nichol & Dhariwal 2021. Constants are float64 and cast to the image's dtype
    where used.

    Args:
        betas: (T,) float64, each in (0, 1]; only the last may be 1 (zero terminal SNR).
        prediction: What the model outputs. "epsilon": the noise. "x0": the image. "v":
            sqrt(abar) epsilon - sqrt(1 - abar) x0 (Salimans & Ho 2022, App. D). "mean": the
            posterior mean (Ho et al. 2020, Eq. 8).
        variance: Variance of the reverse step. "fixed_small": the posterior's. "fixed_large":
            beta_t. "learned": exp of a second output. "learned_range": a second output interpolates
            between the two fixed ones (Nichol & Dhariwal 2021, Eq. 15).
        loss: Loss per image. "simple": mean squared error of the prediction (Ho et al. 2020,
            Eq. 14). "min_snr": the same, weighted (Hang et al. 2023). "bound": vlb_weight * T *
            (this timestep's term of the variational bound, bits/dim; Ho et al. 2020, Eqs. 5 and
            12). "hybrid": "simple" plus that bound with its mean detached, so that the bound trains
            only the variance (Nichol & Dhariwal 2021, Eq. 16).
        vlb_weight: Weight of the bound. 1/T gives the term itself, which Ho et al.'s code trains
            on; 1 gives an estimate of the whole bound.
        min_snr_gamma: The gamma of "min_snr".
        timestep_sampling: How training picks timesteps (ddpm/diffusion/timesteps.py).
        rescale_timesteps: Whether the model sees t * 1000 / T instead of t.

    Raises:
        ValueError: If betas are invalid or options contradict each other; the message says why.
    """

    def __init__(
        self,
        betas: Tensor,
        prediction: Prediction = "epsilon",
        variance: Variance = "fixed_small",
        loss: Loss = "simple",
        vlb_weight: float = 0.001,
        min_snr_gamma: float = 5.0,
        timestep_sampling: Literal["uniform", "loss_second_moment"] = "uniform",
        rescale_timesteps: bool = False,
    ) -> None:
        betas = betas.double()
        if (
            betas.ndim != 1
            or len(betas) < 2
            or not bool(((betas > 0) & (betas <= 1)).all())
            or bool((betas[:-1] == 1).any())
        ):
            raise ValueError(
                "betas must be a list of at least 2 numbers between 0 and 1; only the last may be 1"
            )
        self.prediction = prediction
        self.variance = variance
        self.loss = loss
        self.vlb_weight = vlb_weight
        self.min_snr_gamma = min_snr_gamma
        self.timestep_sampling = timestep_sampling
        self.rescale_timesteps = rescale_timesteps
        self.num_timesteps = len(betas)
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        _check(
            prediction,
            variance,
            loss,
            vlb_weight,
            min_snr_gamma,
            terminal_snr_is_zero=bool(self.alphas_cumprod[-1] == 0),
        )

    @property
    def learns_variance(self) -> bool:
        """Whether the model outputs 2C channels: the prediction, then the variance."""
        return self.variance in ("learned", "learned_range")

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draws x_t from q(x_t | x_0) in one jump (Ho et al. 2020, Eq. 4).

        Args:
            x0: (B, C, H, W) float images in [-1, 1].
            t: (B,) int64 timesteps in [0, T-1].
            noise: Standard normal, shaped like x0.

        Returns:
            x_t, with the shape and dtype of x0.

        Raises:
            ValueError: If noise or t has the wrong shape.
        """
        if noise.shape != x0.shape or t.shape != x0.shape[:1]:
            raise ValueError(
                f"x0 {tuple(x0.shape)} needs noise of that shape and t ({len(x0)},), "
                f"got {tuple(noise.shape)} and {tuple(t.shape)}"
            )
        return self._at("signal", t, x0) * x0 + self._at("sigma", t, x0) * noise

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq. 7).

        Args:
            x0: (B, C, H, W).
            x_t: (B, C, H, W).
            t: (B,) int64 in [0, T-1].
        """
        return self._at("mean_of_x0", t, x0) * x0 + self._at("mean_of_x_t", t, x_t) * x_t

    def posterior_variance(self) -> Tensor:
        """Returns the variance of q(x_{t-1} | x_t, x_0) for each t (Ho et al. 2020, Eq. 7).

        Returns:
            (T,) float64, 0 at t = 0.
        """
        return self.betas * (1 - self._alphas_cumprod_before()) / (1 - self.alphas_cumprod)

    def target(self, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns the model's training target at x_t = q_sample(x0, t, noise).

        Shapes are as in q_sample.
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        if self.prediction == "v":
            return self._at("signal", t, x0) * noise - self._at("sigma", t, x0) * x0
        return self.posterior_mean(x0, x_t, t)

    def estimate(self, output: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        """Turns the model's output into estimates of x0 (Ho et al. 2020, Eq. 15) and the noise.

        The variance output passes through unchanged.

        Args:
            output: (B, C or 2C, H, W).
            x_t: (B, C, H, W).
            t: (B,) int64.
        """
        output, variance_output = output.chunk(2, dim=1) if self.learns_variance else (output, None)
        signal, sigma = self._at("signal", t, x_t), self._at("sigma", t, x_t)
        if self.prediction == "epsilon":
            return Denoised((x_t - sigma * output) / signal, output, variance_output)
        if self.prediction == "v":
            return Denoised(
                signal * x_t - sigma * output, sigma * x_t + signal * output, variance_output
            )
        x0_hat = output
        if self.prediction == "mean":
            of_x0, of_x_t = self._at("mean_of_x0", t, x_t), self._at("mean_of_x_t", t, x_t)
            x0_hat = (output - of_x_t * x_t) / of_x0
        estimate = Denoised(x0_hat, (x_t - signal * x0_hat) / sigma, variance_output)
        return DenoisedMean.of(estimate, output) if self.prediction == "mean" else estimate

    def clipped(self, estimate: Denoised, x_t: Tensor, t: Tensor) -> Denoised:
        """Returns the estimate with x0_hat clipped to [-1, 1] and eps_hat recomputed from it."""
        x0_hat = estimate.x0_hat.clamp(-1, 1)
        eps_hat = (x_t - self._at("signal", t, x_t) * x0_hat) / self._at("sigma", t, x_t)
        held = Denoised(x0_hat, eps_hat, estimate.variance_output)
        if isinstance(estimate, DenoisedMean):
            return DenoisedMean.of(held, estimate.mean)
        return held

    def denoiser(self, model: Model, clip: bool = True) -> Callable[[Tensor, Tensor], Denoised]:
        """Returns the function (x_t, t) -> Denoised that samplers call.

        Args:
            model: (x_t, t) -> output.
            clip: Whether to clip x0_hat to [-1, 1], as the authors' sampling code does, and
                recompute eps_hat from it (Eq. 15 solved for epsilon). A predicted mean stays as it
                is.
        """

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            estimate = self.estimate(self.run(model, x_t, t), x_t, t)
            return self.clipped(estimate, x_t, t) if clip else estimate

        return denoise

    def run(self, model: Model, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the model's output at x_t, in the dtype of x_t.

        The model sees t, rescaled if rescale_timesteps is set.
        """
        return model(x_t, t * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t).to(
            x_t.dtype
        )

    def log_variance(self, variance_output: Tensor | None, t: Tensor, like: Tensor) -> Tensor:
        """Returns the log variance of the reverse step at t.

        At t = 0 the posterior variance is 0, so the one at t = 1 replaces it. There it also
        replaces beta_t in "fixed_large" (as in the authors' code).

        Args:
            variance_output: The model's variance output; None if the variance is fixed.
            t: (B,) int64.
            like: Tensor that gives dtype and device.

        Returns:
            A tensor that broadcasts to `like`.
        """
        small, large = self._at("log_posterior_variance", t, like), self._at("log_beta", t, like)
        if self.variance == "fixed_small":
            return small
        if self.variance == "fixed_large":
            return self._at("log_fixed_large", t, like)
        assert variance_output is not None
        if self.variance == "learned":
            return variance_output
        share = (variance_output + 1) / 2
        return share * large + (1 - share) * small

    def losses(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns the loss of each image at its timestep.

        Shapes are as in q_sample.

        Returns:
            (B,) in the dtype of x0.
        """
        x_t = self.q_sample(x0, t, noise)
        output = self.run(model, x_t, t)
        if self.loss == "bound":
            return self.vlb_weight * self.num_timesteps * self.bound_term(output, x0, x_t, t)
        prediction = output[:, : x0.shape[1]]
        squared_error = (
            (prediction - self.target(x0, x_t, t, noise)).square().flatten(1).mean(dim=1)
        )
        if self.loss == "simple":
            return squared_error
        if self.loss == "min_snr":
            return self._at("min_snr_weight", t, squared_error).flatten() * squared_error
        detached = torch.cat([prediction.detach(), output[:, x0.shape[1] :]], dim=1)
        return squared_error + self.vlb_weight * self.num_timesteps * self.bound_term(
            detached, x0, x_t, t
        )

    def bound_term(
        self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip: bool = False
    ) -> Tensor:
        """Returns one timestep's term of the variational bound (Ho et al. 2020, Eqs. 5 and 13).

        The term is the KL divergence between posterior and model, or at t = 0 the decoder's code
        length. The bound is the sum over all t plus the prior term. Shapes are as in q_sample.

        Args:
            output: The model's output at x_t.
            x0: The clean images.
            x_t: The noised images.
            t: The timesteps.
            clip: Whether to clip x0_hat to [-1, 1], as the authors do in evaluation but not in
                training. A predicted mean stays as it is.

        Returns:
            (B,) bits/dim, averaged over pixels and channels.
        """
        estimate = self.estimate(output, x_t, t)
        if clip:
            estimate = self.clipped(estimate, x_t, t)
        log_variance = self.log_variance(estimate.variance_output, t, x_t)
        if isinstance(estimate, DenoisedMean):
            mean = estimate.mean
        else:
            mean = self.posterior_mean(estimate.x0_hat, x_t, t)
        kl = normal_kl(
            self.posterior_mean(x0, x_t, t),
            self._at("log_posterior_variance", t, x_t),
            mean,
            log_variance,
        )
        decoder = -discretized_log_likelihood(x0, mean, log_variance)
        first = (t == 0)[:, None, None, None]
        return torch.where(first, decoder, kl).flatten(1).mean(dim=1) / math.log(2)

    def prior_term(self, x0: Tensor) -> Tensor:
        """Returns L_T, the KL of q(x_T | x_0) from the standard normal (Ho et al. 2020, Eq. 5).

        Args:
            x0: (B, C, H, W).

        Returns:
            (B,) bits/dim, float64.
        """
        abar = self.alphas_cumprod[-1].to(x0.device)
        kl = 0.5 * (-1 - torch.log1p(-abar) + (1 - abar) + abar * x0.double().square())
        return kl.flatten(1).mean(dim=1) / math.log(2)

    def _alphas_cumprod_before(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Returns row t of a table as (B, 1, 1, 1); tables are cached per device and dtype."""
        key = (name, like.device, like.dtype)
        if key not in self._tables:
            # a sampler in inference mode may build a table that training needs, too
            with torch.inference_mode(False):
                self._tables[key] = self._table(name).to(device=like.device, dtype=like.dtype)
        return self._tables[key][t].reshape(-1, 1, 1, 1)

    def _table(self, name: str) -> Tensor:
        abar, before = self.alphas_cumprod, self._alphas_cumprod_before()
        posterior = self.posterior_variance()
        posterior[0] = posterior[1]
        tables: dict[str, Callable[[], Tensor]] = {
            "signal": lambda: abar.sqrt(),
            "sigma": lambda: (1 - abar).sqrt(),
            "mean_of_x0": lambda: before.sqrt() * self.betas / (1 - abar),
            "mean_of_x_t": lambda: (1 - self.betas).sqrt() * (1 - before) / (1 - abar),
            "log_posterior_variance": lambda: posterior.log(),
            "log_beta": lambda: self.betas.log(),
            "log_fixed_large": lambda: torch.cat([posterior[:1], self.betas[1:]]).log(),
            "min_snr_weight": lambda: min_snr_weights(abar, self.min_snr_gamma, self.prediction),
        }
        return tables[name]()


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Returns the weight of each timestep's squared error (Hang et al. 2023, section 3.4).

    On x0 the weight is min(SNR, gamma); for other predictions it is converted to match.

    Returns:
        (T,) float64.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (
        snr.clamp(max=gamma)
        / {"x0": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}[prediction]
    )


def normal_kl(
    mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor
) -> Tensor:
    """Returns KL(N(mean_1, variance_1) || N(mean_2, variance_2)) of each element, in nats."""
    gap = log_variance_1 - log_variance_2
    return 0.5 * (
        -1 - gap + torch.exp(gap) + (mean_1 - mean_2).square() * torch.exp(-log_variance_2)
    )


def discretized_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Returns the log probability of each 8-bit level of x0 under a normal, in nats.

    The outermost levels are open-ended (Ho et al. 2020, Eq. 13). The normal CDF is the tanh
    approximation of the authors' code, so that results compare with theirs.
    """
    inverse_deviation = torch.exp(-0.5 * log_variance)
    upper = _approximate_cdf((x0 - mean + 1 / 255) * inverse_deviation)
    lower = _approximate_cdf((x0 - mean - 1 / 255) * inverse_deviation)
    inner = torch.log((upper - lower).clamp(min=1e-12))
    at_edges = torch.where(x0 < -0.999, torch.log(upper.clamp(min=1e-12)), inner)
    return torch.where(x0 > 0.999, torch.log((1 - lower).clamp(min=1e-12)), at_edges)


def _approximate_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _check(
    prediction: str,
    variance: str,
    loss: str,
    vlb_weight: float,
    min_snr_gamma: float,
    terminal_snr_is_zero: bool,
) -> None:
    learned = variance in ("learned", "learned_range")
    if terminal_snr_is_zero and prediction == "epsilon":
        raise ValueError(
            "prediction=epsilon does not work with a schedule of zero terminal SNR: "
            "its last x_t is pure noise and says nothing about x0; use prediction=v or x0"
        )
    if learned and loss in ("simple", "min_snr"):
        raise ValueError(
            f"variance={variance} is not trained by loss={loss}, which has no term for it; "
            "use loss=hybrid or bound"
        )
    if not learned and loss == "hybrid":
        raise ValueError(
            f"loss=hybrid trains a learned variance, but variance={variance} is fixed; "
            "use loss=simple or variance=learned_range"
        )
    if loss == "min_snr" and prediction == "mean":
        raise ValueError(
            "loss=min_snr has no weights for prediction=mean; use prediction=epsilon, x0 or v"
        )
    for name, value in (("vlb_weight", vlb_weight), ("min_snr_gamma", min_snr_gamma)):
        if value <= 0:
            raise ValueError(f"{name}={value} must be positive")
