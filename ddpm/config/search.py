"""Learned searches: a sweeper that picks its next jobs by what those before came to."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from ddpm.config.compose import Composed


class Score(NamedTuple):
    """What a search goes by.

    Attributes:
        metric: What the value is of.
        value: Of a complete job.
        direction: Which values are the better ones, in Optuna's word.
    """

    metric: str
    value: float
    direction: Literal["minimize", "maximize"]


Scored = Callable[[Composed], Score]


def learns(sweeper: Mapping[str, Any]) -> bool:
    """Whether a sweeper of these settings picks jobs itself; Hydra's own is told them all."""
    return not str(sweeper["_target_"]).endswith(".BasicSweeper")


def check(sweeper: Mapping[str, Any], scored: Scored | None) -> None:
    """Refuses a search that nothing could be searched by.

    Raises:
        ValueError: If the command has no score, or there is more than one direction.
    """
    if scored is None:
        raise ValueError("hydra/sweeper: a search goes by what a run came to; ddpm.train alone has")
    if _direction(sweeper) not in ("minimize", "maximize"):
        raise ValueError(
            f"hydra.sweeper.direction={_direction(sweeper)}: a run has one score; there are "
            "minimize and maximize"
        )
    # what a failed job came to is told already; without a handler Python prints it again
    logging.getLogger(str(sweeper["_target_"]).partition(".")[0]).addHandler(logging.NullHandler())


def check_score(sweeper: Mapping[str, Any], score: Score) -> None:
    """Refuses to search in the wrong direction.

    Raises:
        ValueError: If the other one is better.
    """
    if score.direction != _direction(sweeper):
        raise ValueError(
            f"hydra.sweeper.direction={_direction(sweeper)}: the search goes by {score.metric}, of "
            f"which {'more' if score.direction == 'maximize' else 'less'} is better; type "
            f"hydra.sweeper.direction={score.direction}"
        )


def best(scores: Mapping[int, Score]) -> str:
    """Returns in a line which job of a search came to the best value."""
    choose = max if next(iter(scores.values())).direction == "maximize" else min
    number = choose(scores, key=lambda one: scores[one].value)
    return f"best: job {number}, {scores[number].metric} {scores[number].value:.6g}"


def _direction(sweeper: Mapping[str, Any]) -> str:
    direction = sweeper.get("direction")
    return str(getattr(direction, "name", direction))
