"""Which run: METRIC names a figure, and runs are in its order, by one protocol alone.

METRIC is `loss`, a figure of evaluation.json as `eval/fid`, or a setting as `lr`. Of a figure all
words of its column's name may follow, or some, apart by colons: `eval/fid@50k:ddim50:ema`. They
stand for the final value; with the word `best`, for the best.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ddpm.compare.tables import Row, differences, in_a_word, metric_columns, protocol_of
from ddpm.config.compose import nearest
from ddpm.runs.identity import flat
from ddpm.runs.reader import At, Compared, format_value
from ddpm.runs.results import better

Protocol = tuple[str, str]  # as protocol_of gives it


class Ordered(NamedTuple):
    """Runs in the order of a figure.

    Attributes:
        column: What the figure is called in the table.
        compared: The runs: those with the figure, the better first, or the least first where
            neither is better; those without; those that failed.
        values: Of each run, as the table shows it; None where it has none.
        sign: 1 where less comes first, else -1.
        ranked: Runs with the figure that have not failed; they come first.
        note: What there is to say of the others, in a line; None where there are none.
    """

    column: str
    compared: list[Compared]
    values: list[Any]
    sign: int
    ranked: int
    note: str | None


def by(compared: Sequence[Compared], metric: str, key: str) -> Ordered:
    """Puts runs in the order of METRIC.

    Args:
        compared: The runs.
        metric: As this module says.
        key: Of the command line, for errors.

    Raises:
        ValueError: If there is no such figure, or figures of several protocols are meant.
    """
    if _is_figure(metric):
        column, values, sign = _figures(compared, metric, key)
    else:
        column, sign = setting(compared, metric, key), 1
        values = [one.settings.get(column) for one in compared]
    places = [
        2 if one.status == "failed" else 0 if _ranks(value) else 1
        for one, value in zip(compared, values, strict=True)
    ]
    indices = sorted(
        range(len(compared)),
        key=lambda index: (places[index], _place(values[index], sign) if not places[index] else ()),
    )
    ranked, without, failed = (places.count(place) for place in (0, 1, 2))
    behind = [f"{without} without it"] if without else []
    behind += [f"{failed} failed"] if failed else []
    return Ordered(
        column,
        [compared[index] for index in indices],
        [values[index] for index in indices],
        sign,
        ranked,
        f"{key}={metric}: {ranked} of {len(compared)} runs are in its order; behind them "
        f"{', then '.join(behind)}"
        if behind
        else None,
    )


def by_mean(seeds: Sequence[Row], ordered: Ordered) -> list[Row]:
    """Puts rows of means over seeds in the same order, those without the figure last."""

    def place(row: Row) -> tuple[Any, ...]:
        mean = row.get(f"{ordered.column} mean", row.get(ordered.column))
        return (0, *_place(mean, ordered.sign)) if _ranks(mean) else (1,)

    return sorted(seeds, key=place)


def best(compared: Sequence[Compared], metric: str) -> Ordered:
    """Puts runs in the order of METRIC, whose first is then the best one.

    Raises:
        ValueError: If no run is, or METRIC says not which of two runs is the better one.
    """
    if not _is_figure(metric):
        raise ValueError(
            f"best={metric}: a setting is neither better nor worse; give loss or eval/NAME"
        )
    ordered = by(compared, metric, "best")
    if better(ordered.column.partition("@")[0].split()[0]) is None:
        raise ValueError(
            f"best={metric}: of {ordered.column} neither less nor more is better; "
            "order_by= sorts by it"
        )
    if not ordered.ranked:
        raise ValueError(f"best={metric}: no run has this figure but such as failed, or it is NaN")
    return ordered


def choose(compared: Sequence[Compared], metric: str, key: str) -> dict[str, Protocol]:
    """Returns the columns that METRIC names, one for each protocol.

    Raises:
        ValueError: If there is none; it names what there is.
    """
    columns = metric_columns(compared)
    wanted = _words(metric.removeprefix("eval/"))
    of_kind = {
        column: protocol
        for column, protocol in columns.items()
        if (protocol[0] == "loss") == (not metric.startswith("eval/"))
    }
    for column, protocol in of_kind.items():
        if _words(column) == wanted:
            return {column: protocol}
    known: dict[Protocol, set[str]] = {
        protocol_of(result): {
            result.metric,
            *(word for pair in flat(result.protocol).items() for word in _words(in_a_word(*pair))),
        }
        for one in compared
        for result in one.results
    }
    found = {
        column: protocol
        for column, protocol in of_kind.items()
        if set(wanted) <= {*_words(column), *known[protocol]}
    }
    if not found:
        there = [name_of(column, protocol) for column, protocol in columns.items()]
        raise ValueError(
            f"{key}={metric}: no run has such a figure{nearest(metric, there)}"
            if there
            else f"{key}={metric}: no run has a figure yet"
        )
    return found


def name_of(column: str, protocol: Protocol) -> str:
    """Returns a column's name as METRIC, to be typed as it is."""
    return ("" if protocol[0] == "loss" else "eval/") + ":".join(_words(column))


def setting(compared: Sequence[Compared], name: str, key: str) -> str:
    """Returns the setting that a name means: its dotted key, or the last word of one alone.

    Raises:
        ValueError: If there is none, or several have that last word.
    """
    keys = [setting for one in compared for setting in one.settings]
    return _named(keys, name, f"{key}={name} is not a figure (loss, eval/NAME) or a setting")


def differing(compared: Sequence[Compared], name: str, key: str) -> str:
    """Returns the setting that a name means, as `setting` does, of those that differ but the seed.

    Raises:
        ValueError: If there is none, or several have that last word.
    """
    keys = [setting for one in differences(compared) for setting in one if setting != "seed"]
    return _named(keys, name, f"{key}={name} is no setting, but the seed, that differs")


def _named(keys: Sequence[str], name: str, otherwise: str) -> str:
    keys = list(dict.fromkeys(keys))
    found = [name] if name in keys else [key for key in keys if key.rpartition(".")[2] == name]
    if name == "lr" and "optimizer.lr" in found:  # whatever an own schedule calls so too
        return "optimizer.lr"
    if len(found) > 1:
        raise ValueError(f"{otherwise} alone: several end so, {', '.join(found)}")
    if not found:
        raise ValueError(f"{otherwise} of these runs{nearest(name, keys)}")
    return found[0]


def _is_figure(metric: str) -> bool:
    return metric.startswith("eval/") or metric.split(":")[0] == "loss"


def _figures(
    compared: Sequence[Compared], metric: str, key: str
) -> tuple[str, list[float | At | None], int]:
    """The column that is meant, each run's value in it, and 1 where less is better, else -1."""
    words = metric.split(":")
    bests = "best" in words[1:]
    found = choose(compared, ":".join(word for word in words if word != "best"), key)
    if len(found) > 1:
        names = ", ".join(name_of(*one) for one in found.items())
        raise ValueError(
            f"{key}={metric} means figures of {len(found)} protocols, which do not compare: give "
            f"one of {names}, or words that one alone has"
        )
    ((column, protocol),) = found.items()
    values: list[float | At | None] = []
    for one in compared:
        result = next((some for some in one.results if protocol_of(some) == protocol), None)
        chosen = None if result is None else result.best if bests else result.final
        values.append(
            None if chosen is None else chosen[0] if chosen[1] == one.steps else At(*chosen)
        )
    return f"{column} best" if bests else column, values, -1 if better(protocol[0]) is max else 1


def _words(name: str) -> list[str]:
    """The words of a name, as Hydra and shells take them: seed-0 for seed=0."""
    return [re.sub(r"[^\w.@+/-]+", "-", word) for word in re.split(r"[:\s]+", name.strip())]


def _ranks(value: Any) -> bool:
    """Whether a run has a value that can be put in an order: NaN is less than nothing."""
    number = value.value if isinstance(value, At) else value
    return number is not None and not (isinstance(number, float) and not math.isfinite(number))


def _place(value: Any, sign: int) -> tuple[Any, ...]:
    number = value.value if isinstance(value, At) else value
    if isinstance(number, int | float):
        return (0, sign * number)
    return (1, format_value(number))
