"""Networks: callables (x_t, t) -> output at the resolution of x_t.

They know nothing about the noise schedule or the data.
"""

from ddpm.models.unet import UNet
from ddpm.models.unet_readme import ReadmeUNet

__all__ = ["ReadmeUNet", "UNet"]
