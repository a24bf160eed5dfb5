"""A study's file, and the runs and measurements that its lines stand for."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from pydantic import Field

from ddpm.config.compose import EXPERIMENTS, nearest
from ddpm.config.validation import Section, Text, validate
from ddpm.system.plain import Unreadable, read_yaml

STUDIES = EXPERIMENTS / "studies"
MOST_BYTES = 200_000  # that a study's file may have
# only the command line may grant trust; the study itself sets the rest
SAID_ELSEWHERE = re.compile(
    r"hydra\b|(.*\.)?trusted_modules$|(outputs|resume|seed|run|runs|device)$"
)
Value = str | int | float | bool | None
Choice = dict[str, Value]  # settings as a study's lines give them: {objective: epsilon}
Settings = dict[str, str]  # the same of one run or measurement, as typed


class Claim(Section):
    """A claim of a paper, and the numbers that would support it.

    Each seed gives one number, below 0 if it supports the claim: the measure of `less` minus that
    of `than`, or the slope of the measure over log2 of a setting (`falls_with`; its negative for
    `rises_with`). If a side has several settings, the mean over those that both sides have in
    common counts.

    Attributes:
        says: The claim, as a sentence.
        source: Where the claim is made.
        of: The measure, as evaluation.json or metrics.jsonl names it (`fd_digits`,
            `train/grad_norm`: the mean over the second half of training).
        where: The settings to which the whole claim is restricted.
        less: The settings that should have less of the measure.
        than: The settings to compare them with.
        falls_with: The setting with which the measure should fall.
        rises_with: The setting with which the measure should rise.
        best: Replaces the measure by log2 of the value of this setting with the least of it.
    """

    says: Text
    source: Text
    of: Text
    where: Choice = Field(default_factory=dict)
    less: Choice | None = None
    than: Choice | None = None
    falls_with: Text | None = None
    rises_with: Text | None = None
    best: Text | None = None


class Study(Section):
    """A file of experiments/studies/.

    Attributes:
        title: The title of its part of the page.
        question: The question, in a sentence or two.
        method: How the measure was chosen, and what it can detect.
        seeds: Number of runs per setting.
        train: Command lines of ddpm.train -m, without seeds.
        evaluate: Command lines of ddpm.evaluate -m, without runs and without the seed, which is
            the run's.
        over: The setting on the picture's x-axis; None for that of a claim, or for one place per
            setting.
        claims: The claims to test.
    """

    title: Text
    question: Text
    method: Text
    seeds: Annotated[int, Field(ge=3)]
    train: Annotated[list[Annotated[list[Text], Field(min_length=1)]], Field(min_length=1)]
    evaluate: list[Annotated[list[Text], Field(min_length=1)]] = Field(default_factory=list)
    over: Text | None = None
    claims: Annotated[list[Claim], Field(min_length=1)]


@dataclass(frozen=True)
class Job:
    """A run, or a way to measure it: one of those that a line with commas stands for.

    Attributes:
        words: Its overrides.
        settings: The overrides as key -> value.
    """

    words: list[str]
    settings: Settings


def names() -> list[str]:
    """Returns the names of all studies."""
    return sorted(file.stem for file in STUDIES.glob("*.yaml"))


def load(name: str) -> Study:
    """Returns a study.

    Args:
        name: Name of a file in experiments/studies/, or path to another one, PATH.yaml.

    Raises:
        ValueError: If there is no such study, or its file is invalid.
    """
    own = name.endswith(".yaml")
    file = Path(name).expanduser() if own else STUDIES / f"{name}.yaml"
    if own and not file.is_file():
        raise ValueError(f"study.name={name} is not a file")
    if not file.is_file():
        raise ValueError(f"study.name={name}: no such study{nearest(name, names())}")
    try:
        plain = read_yaml(file, MOST_BYTES)
        if not isinstance(plain, dict):
            raise ValueError("the file must hold keys and values")
        study = validate(Study, plain)
        for claim in study.claims:
            _check(claim, study)
    except Unreadable:
        raise
    except ValueError as error:
        raise ValueError(f"{file.name}: {' '.join(str(error).split())}") from None
    return study


def _check(claim: Claim, study: Study) -> None:
    ways = [
        claim.less is not None and claim.than is not None,
        claim.falls_with is not None,
        claim.rises_with is not None,
    ]
    if sum(ways) != 1 or (claim.less is None) != (claim.than is None):
        raise ValueError(
            f"claim {claim.says!r}: give exactly one of less and than, falls_with, rises_with"
        )
    cells = [
        {**run.settings, **measured.settings}
        for run in jobs(study.train)
        for measured in jobs(study.evaluate) or [Job([], {})]
    ]
    for side in (claim.less, claim.than, {}):
        if side is not None and not any(matches(cell, {**claim.where, **side}) for cell in cells):
            raise ValueError(
                f"claim {claim.says!r}: no run or measurement has { ({**claim.where, **side}) }"
            )
    for key in (claim.falls_with, claim.rises_with, claim.best):
        found = [cell for cell in cells if key in cell and matches(cell, claim.where)]
        if key is not None and len({cell[key] for cell in found}) < 2:
            raise ValueError(f"claim {claim.says!r}: {key} has fewer than two values")


def jobs(lines: Sequence[Sequence[str]]) -> list[Job]:
    """Returns the jobs that lines with commas stand for, as -m expands them.

    Raises:
        ValueError: If a line has something that is no override, or that a study may not set.
    """
    return [job for line in lines for job in _jobs(line)]


def _jobs(line: Sequence[str]) -> Iterator[Job]:
    try:
        parsed = OverridesParser.create().parse_overrides(list(line))
    except HydraException as error:
        raise ValueError(" ".join(str(error).split())) from None
    values = [
        list(one.sweep_string_iterator())
        if one.is_sweep_override()
        else [one.get_value_element_as_str()]
        for one in parsed
    ]
    keys = [one.key_or_group for one in parsed]
    # Hydra writes booleans as Python does
    values = [[{"True": "true", "False": "false"}.get(one, one) for one in of] for of in values]
    for given in line:
        key = given.partition("=")[0]
        if not re.fullmatch(r"[a-z]\w*(\.\w+)*", key) or SAID_ELSEWHERE.match(key):
            raise ValueError(f"{given}: a study's line may not set this key")
    for chosen in itertools.product(*values):
        pairs = zip(keys, chosen, strict=True)
        yield Job([f"{key}={value}" for key, value in pairs], dict(zip(keys, chosen, strict=True)))


def matches(settings: Settings, choice: Mapping[str, Any]) -> bool:
    """Whether settings agree with a choice on all its keys; null means that the key is not set."""
    return all(
        settings.get(key) == (None if value is None else word(value))
        for key, value in choice.items()
    )


def word(value: Value) -> str:
    """Returns a value as typed on a command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
