"""Converts between diffusers' scheduler_config.json and a GaussianDiffusion.

What one side cannot express is refused with the reason, never dropped.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm.diffusion import schedules
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.weights.unet_settings import VERSION, key_of, read_settings

SCHEDULER_DEFAULTS: dict[str, Any] = {  # of diffusers' DDPMScheduler
    **{
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
    },
    **{
        "variance_type": "fixed_small",
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
    },
    **{
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
    },
    # which timesteps a shorter chain visits; here the sampler decides that
    **{"timestep_spacing": "leading", "steps_offset": 0},
}
# of DDIMScheduler and of old versions
SCHEDULER_OTHERS = {"set_alpha_to_one": True, "tensor_format": "pt", "predict_epsilon": True}
SCHEDULER_FIXED: dict[str, list[Any]] = {
    "thresholding": [False],
    "set_alpha_to_one": [True],
    "clip_sample": [True, False],
    "predict_epsilon": [True],
}
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours -> diffusers'
VARIANCES: dict[str, Any] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


class Chain(NamedTuple):
    """The process that a folder's scheduler describes.

    Attributes:
        diffusion: The process.
        clip: Whether sampling clips x0_hat to [-1, 1].
    """

    diffusion: GaussianDiffusion
    clip: bool


def scheduler_config(diffusion: GaussianDiffusion) -> dict[str, Any]:
    """Returns the contents of diffusers' scheduler_config.json for a process.

    "linspace" visits the timesteps of "respaced" in ddpm.diffusion.spacing, except for ties.

    Raises:
        ValueError: If diffusers cannot express the process, with the reason.
    """
    if diffusion.prediction not in PREDICTIONS:
        raise ValueError(
            f"objective.prediction={diffusion.prediction}: diffusers' schedulers know only "
            f"{', '.join(PREDICTIONS)}"
        )
    if diffusion.variance not in VARIANCES:
        raise ValueError(
            f"objective.variance={diffusion.variance}: diffusers would take the network's log "
            "variance for the variance itself"
        )
    if diffusion.rescale_timesteps and diffusion.num_timesteps != 1000:
        raise ValueError(
            "objective.rescale_timesteps=true with "
            f"schedule.num_timesteps={diffusion.num_timesteps}: diffusers passes timesteps to the "
            "network unscaled"
        )
    betas = diffusion.betas
    is_line = torch.allclose(
        betas,
        torch.linspace(float(betas[0]), float(betas[-1]), len(betas), dtype=torch.float64),
        rtol=1e-10,
        atol=0,
    )
    settings = {
        "num_train_timesteps": len(betas),
        "beta_start": float(betas[0]),
        "beta_end": float(betas[-1]),
        "trained_betas": None if is_line else betas.tolist(),
        "variance_type": diffusion.variance,
        "prediction_type": PREDICTIONS[diffusion.prediction],
        "timestep_spacing": "linspace",
    }
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        **SCHEDULER_DEFAULTS,
        **settings,
    }


def chain(config: dict[str, Any], model: Mapping[str, Any]) -> Chain:
    """Returns the process of a diffusers scheduler_config.json, for a network as in conf/model/.

    Raises:
        ValueError: If GaussianDiffusion cannot express it, with the reason.
    """
    settings = read_settings(
        config,
        ["DDPMScheduler", "DDIMScheduler"],
        {**SCHEDULER_DEFAULTS, **SCHEDULER_OTHERS},
        SCHEDULER_FIXED,
    )
    if settings["clip_sample"] and settings["clip_sample_range"] != 1:
        raise ValueError(
            f"clip_sample_range={settings['clip_sample_range']} must be 1, the range of the images"
        )
    if settings["variance_type"] not in VARIANCES:
        raise ValueError(
            f"variance_type={settings['variance_type']} must be one of {', '.join(VARIANCES)}"
        )
    variance = VARIANCES[settings["variance_type"]]
    learned = variance == "learned_range"
    if model["out_channels"] != model["in_channels"] * (2 if learned else 1):
        raise ValueError(
            f"variance_type={variance} does not fit a network with {model['in_channels']} input "
            f"and {model['out_channels']} output channels"
        )
    prediction = key_of(PREDICTIONS, "prediction_type", settings["prediction_type"])
    return Chain(
        GaussianDiffusion(
            _betas(settings), prediction, variance, "hybrid" if learned else "simple"
        ),
        settings["clip_sample"],
    )


def _betas(settings: Mapping[str, Any]) -> Tensor:
    num_timesteps, start, end = (
        settings["num_train_timesteps"],
        settings["beta_start"],
        settings["beta_end"],
    )
    kind, zero_terminal_snr = settings["beta_schedule"], settings["rescale_betas_zero_snr"]
    if settings["trained_betas"] is not None:
        betas = torch.tensor(settings["trained_betas"], dtype=torch.float64)
        if len(betas) != num_timesteps or zero_terminal_snr:
            raise ValueError(
                f"trained_betas must be num_train_timesteps={num_timesteps} numbers and needs "
                "rescale_betas_zero_snr=false"
            )
        return betas
    if kind == "linear":
        return schedules.linear(num_timesteps, start, end, zero_terminal_snr)
    if kind == "scaled_linear":
        return schedules.quad(num_timesteps, start, end, zero_terminal_snr)
    if kind == "squaredcos_cap_v2":
        return schedules.cosine(num_timesteps, 0.008, 0.999, zero_terminal_snr)
    if kind == "sigmoid" and not zero_terminal_snr:
        return (
            torch.sigmoid(torch.linspace(-6, 6, num_timesteps, dtype=torch.float64)) * (end - start)
            + start
        )
    raise ValueError(
        f"beta_schedule={kind} with rescale_betas_zero_snr={zero_terminal_snr} is not supported"
    )
