"""Imports for the fork server: everything that a command imports sooner or later."""

import contextlib
import gc
import importlib

with contextlib.suppress(ImportError):
    import sklearn.datasets  # noqa: F401

import torch
import torch.utils.tensorboard

from ddpm.config.compose import compose
from ddpm.models import UNet

for name in ("config.cli", "train.run", "sample.run", "evaluate.run"):
    importlib.import_module(f"ddpm.{name}")

with torch.device("meta"):  # imports the meta functions that building a network needs
    UNet(
        resolution=8,
        in_channels=1,
        out_channels=1,
        base_channels=8,
        channel_multipliers=[1],
        num_res_blocks=1,
        attention_resolutions=[8],
        norm_groups=4,
        dropout=0.0,
    )

compose([])  # reads the recipes and finds Hydra's plugins
gc.collect()
# A collection in a fork would touch all these shared objects, and so copy their pages.
gc.freeze()
