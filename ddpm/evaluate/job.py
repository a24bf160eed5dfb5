"""One evaluation of a network: what all its metrics need, and where their figures go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ddpm.config.schema import EvaluationSettings
from ddpm.config.validation import Node
from ddpm.evaluate.reference import ReferenceFile
from ddpm.evaluate.splits import Splits
from ddpm.runs import results
from ddpm.runs.results import Measurement, told
from ddpm.sample.drawing import Drawing
from ddpm.sample.subject import Trained
from ddpm.system.files import short_hash
from ddpm.tune.decide import Tune

NAMES = {  # metric -> how the names of its figures begin
    "fd": ("fid", "fd_"),
    "kd": ("kid", "kd_"),
    "precision_recall": ("precision", "recall"),
    "inception_score": ("inception_score", "class_score_"),
    "classes": ("named", "class_accuracy"),
    "nearest": ("nearest_ratio",),
    "colour": ("channel_",),
    "losses": ("loss_t",),
    "bits_per_dim": ("bits_per_dim", "rmse"),
}
Keep = Callable[[list[Measurement]], None]


@dataclass(frozen=True)
class Job:
    """What every metric of one evaluation needs.

    Attributes:
        trained: The network that is measured.
        settings: The metrics and their protocol.
        processes: The processes that share the work.
        drawing: What draws the samples.
        sampler: The settings of the sampler.
        file: The file of evaluation.reference, or None.
        splits: The splits of the run's data.
        about: The part of the protocol that all metrics have in common.
        network: Identity of the network. Figures are recorded with it, but it is not part of a
            protocol.
        entries: The figures recorded before this evaluation.
        keep: Records figures, on the main process.
        tune: How the network is executed while it draws (ddpm.sample.tuning).
        found: The figures of this evaluation, measured or recorded before, on the main process.
        missing: Why some metrics could not be measured.
    """

    trained: Trained
    settings: EvaluationSettings
    processes: PartialState
    drawing: Drawing
    sampler: Node
    file: ReferenceFile | None
    splits: Splits
    about: dict[str, Any]
    network: str
    entries: list[dict[str, Any]]
    keep: Keep
    tune: Tune
    found: list[Measurement] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def has(self, metric: str, protocol: dict[str, Any]) -> bool:
        """Whether a metric's figures are recorded already; if so, adds them to `found`."""
        before = results.recorded(self.entries, NAMES[metric], protocol, self.network)
        if self.processes.is_main_process:
            self.found.extend(before)
        return bool(before)

    def add(self, figures: Sequence[Measurement]) -> None:
        """Records figures, on the main process."""
        if self.processes.is_main_process:
            of_network = [replace(one, network=self.network) for one in figures]
            self.keep(of_network)
            self.found.extend(of_network)


def file_of(job: Job, words: str, protocol: dict[str, Any] | None = None) -> Path:
    """Returns the path of a file for this step; if a protocol is given, the name has its hash."""
    more = "" if protocol is None else f"-{short_hash([job.network, told(words, protocol)])}"
    name = f"step_{job.trained.step:08d}_{job.trained.kind}_{words}{more}"
    return job.trained.run.path / "evaluation" / name
