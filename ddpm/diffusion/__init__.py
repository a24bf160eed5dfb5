"""The diffusion process and the samplers that reverse it.

Schedules (betas), the process (q, losses, bound), samplers, and the timesteps of training.
"""

from ddpm.diffusion.process import Denoised, GaussianDiffusion

__all__ = ["Denoised", "GaussianDiffusion"]
