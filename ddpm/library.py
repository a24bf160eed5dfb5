"""A trained run from Python: `ddpm.load`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hydra.errors import HydraException
from torch import nn
from tqdm import tqdm

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.explain import explain_composition
from ddpm.config.schema import Config
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.runs.folder import RunFolder
from ddpm.runs.results import read_results
from ddpm.sample.images import to_uint8
from ddpm.sample.run import Settings, settings_of
from ddpm.sample.subject import class_numbers, of_run
from ddpm.system import devices

Weights = Literal["ema", "raw"]
Device = Literal["auto", "cpu", "cuda", "mps"]


class Run:
    """A trained run. Reading it changes nothing in its folder.

    Attributes:
        path: The run's folder.
        config: The configuration that it was trained with.
    """

    def __init__(self, path: str | Path | RunFolder, trusted_modules: Sequence[str] = ()) -> None:
        """Opens a run's folder.

        Args:
            path: The folder, as training prints it first and last, or as `ddpm.run` returns it.
            trusted_modules: Prefixes of your own modules that the run's `_target_`s may name.

        Raises:
            ValueError: If this is no run's folder, or it names classes that are not trusted.
        """
        self.path = path.path if isinstance(path, RunFolder) else Path(path).expanduser()
        self._folder, self._trusted = RunFolder(self.path), list(trusted_modules)
        self.config: Config = self._folder.config(self._trusted)

    def __repr__(self) -> str:
        return f"ddpm.load({str(self.path)!r})"

    @property
    def status(self) -> str:
        """How the run stands: complete, running, preempted, failed, cut off or not started."""
        return self._folder.status()

    @property
    def diffusion(self) -> GaussianDiffusion:
        """The process that the network was trained for."""
        return build.diffusion(self.config)

    def network(
        self, step: int | None = None, weights: Weights = "ema", device: Device = "cpu"
    ) -> nn.Module:
        """Returns the network in evaluation mode.

        Args:
            step: The checkpoint's optimizer step; None for the newest.
            weights: The moving average, or the weights as trained.
            device: "auto", "cpu", "cuda" or "mps".

        Returns:
            A module that maps x_t (B, C, H, W) in [-1, 1], t (B,) int64 in [0, T-1] and, if the run
            was trained with classes, class numbers (B,) int64 to its output.

        Raises:
            ValueError: If there is no such checkpoint or device.
        """
        trained = of_run(self._folder, step, weights, self._trusted)
        return trained.subject.network(devices.device(device)).eval()

    def sample(
        self,
        num_samples: int = 16,
        sampler: str | None = None,
        seed: int = 0,
        classes: Sequence[int | str] | None = None,
        step: int | None = None,
        weights: Weights = "ema",
        batch_size: int = 64,
        device: Device = "auto",
        progress: bool = True,
        **settings: Any,
    ) -> np.ndarray:
        """Draws the images that `python -m ddpm.sample` draws with the same settings.

        Args:
            num_samples: How many.
            sampler: An option of conf/sampler/, such as "ddim50"; None for the command's default.
            seed: Image i is a function of the seed, of i and of its class.
            classes: Numbers or names, taken in turn; None for all of them.
            step: The checkpoint's optimizer step; None for the newest.
            weights: The moving average, or the weights as trained.
            batch_size: Images drawn at once.
            device: "auto", "cpu", "cuda" or "mps".
            progress: Whether to show a progress bar.
            settings: Of the sampler, such as num_steps=20 or guidance_scale=2.0.

        Returns:
            (num_samples, H, W, C) uint8.

        Raises:
            ValueError: If a setting does not exist or does not fit the run; the message says why.
        """
        chosen = self._settings(
            sampler,
            settings,
            num_samples=num_samples,
            seed=seed,
            batch_size=batch_size,
            step=step,
            weights=weights,
            device=device,
            classes=None if classes is None else list(classes),
        )
        subject = of_run(self._folder, chosen.step, chosen.weights, self._trusted).subject
        turn = class_numbers(chosen.classes, subject.classes)
        drawing = subject.drawing(
            build.sampler(chosen.sampler, subject.diffusion),
            chosen.seed,
            devices.device(chosen.device),
            chosen.precision,
        )
        drawn = []
        with tqdm(total=num_samples, desc="sampling", unit="img", disable=not progress) as bar:
            for start in range(0, num_samples, chosen.batch_size):
                indices = range(start, min(start + chosen.batch_size, num_samples))
                some = None if turn is None else [turn[index % len(turn)] for index in indices]
                drawn.append(to_uint8(drawing.images(indices, some)))
                bar.update(len(indices))
        return np.concatenate(drawn)

    def metrics(self) -> list[dict[str, Any]]:
        """Returns what was measured of the run, one row per metric, protocol and step.

        `pandas.DataFrame(run.metrics())` is a table of them. The loss is the training loss, a mean
        over the last steps; everything else was measured by training or by `ddpm.evaluate`.

        Returns:
            Rows with "metric", "name" (the metric with its protocol in a word), "step", "value",
            "deviation" (over subsets or splits; None where there is none) and "protocol".

        Raises:
            ValueError: If a file in the folder cannot be read.
        """
        rows = []
        for result in read_results(self._folder, self._folder.plain()):
            about = {"metric": result.metric, "name": result.name}
            last = result.final[1]
            for step, value in result.measured or (result.final[::-1],):
                deviation = result.deviation if step == last else None
                figure = {"step": step, "value": value, "deviation": deviation}
                rows.append({**about, **figure, "protocol": result.protocol})
        return rows

    def _settings(self, sampler: str | None, of_sampler: dict[str, Any], **said: Any) -> Settings:
        """What ddpm.sample would make of this, checked as there."""
        words = [] if sampler is None else [f"sampler={sampler}"]
        try:
            composed = compose(words, "sample")
        except HydraException as error:
            raise ValueError(explain_composition(error, words, "sample", None)) from error
        known = [str(name) for name in composed.cfg.sampler if not str(name).startswith("_")]
        for key, value in of_sampler.items():
            if key not in known:
                raise ValueError(
                    f"{key}={value} is no setting of sampler={composed.choices['sampler']}; "
                    f"there are {', '.join(known)}"
                )
            composed.cfg.sampler[key] = value
        said |= {"run": str(self.path), "trusted_modules": self._trusted}
        for key, value in said.items():
            composed.cfg[key] = value
        return settings_of(composed)
