"""Networks: callables (x_t, t) -> output of the shape of x_t.

They know neither the noise schedule nor the data.
"""

from ddpm.models.unet import UNet
from ddpm.models.unet_readme import ReadmeUNet

__all__ = ["ReadmeUNet", "UNet"]
