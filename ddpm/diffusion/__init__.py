"""The diffusion process and how it is walked back: schedules (betas), the process (q, losses, bound), samplers, timesteps of training."""

from ddpm.diffusion.process import Denoised, GaussianDiffusion

__all__ = ["Denoised", "GaussianDiffusion"]
