"""Searches: sweepers that pick their next jobs by the scores of the earlier ones."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from ddpm.config.compose import Composed


class Score(NamedTuple):
    """The value that a search optimizes.

    Attributes:
        metric: The metric's name.
        value: Its value for a complete job.
        direction: Which values are better, as Optuna calls it.
    """

    metric: str
    value: float
    direction: Literal["minimize", "maximize"]


Scored = Callable[[Composed], Score]


def learns(sweeper: Mapping[str, Any]) -> bool:
    """Whether the sweeper picks jobs itself, unlike Hydra's own, which gets a fixed list."""
    return not str(sweeper["_target_"]).endswith(".BasicSweeper")


def check(sweeper: Mapping[str, Any], scored: Scored | None) -> None:
    """Rejects a search without a score or a single direction.

    Raises:
        ValueError: If the command has no score, or there is not exactly one direction.
    """
    if scored is None:
        raise ValueError("hydra/sweeper: a search needs a score, and only ddpm.train has one")
    if _direction(sweeper) not in ("minimize", "maximize"):
        raise ValueError(
            f"hydra.sweeper.direction={_direction(sweeper)}: a run has one score; use minimize "
            "or maximize"
        )
    # a failed job has printed its error; without a handler Python prints it again
    logging.getLogger(str(sweeper["_target_"]).partition(".")[0]).addHandler(logging.NullHandler())


def check_score(sweeper: Mapping[str, Any], score: Score) -> None:
    """Rejects a search in the wrong direction.

    Raises:
        ValueError: If the other direction is the better one for this metric.
    """
    if score.direction != _direction(sweeper):
        raise ValueError(
            f"hydra.sweeper.direction={_direction(sweeper)}: the search optimizes {score.metric}, "
            f"and {'higher' if score.direction == 'maximize' else 'lower'} is better; type "
            f"hydra.sweeper.direction={score.direction}"
        )


def best(scores: Mapping[int, Score]) -> str:
    """Returns a line that names the best job of a search and its score."""
    choose = max if next(iter(scores.values())).direction == "maximize" else min
    number = choose(scores, key=lambda one: scores[one].value)
    return f"best: job {number}, {scores[number].metric} {scores[number].value:.6g}"


def _direction(sweeper: Mapping[str, Any]) -> str:
    direction = sweeper.get("direction")
    return str(getattr(direction, "name", direction))
