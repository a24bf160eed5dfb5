"""Sorts runs by METRIC, always by figures of a single protocol.

METRIC is `loss`, a figure of evaluation.json such as `eval/fid`, or a setting such as `lr`. A
figure may be followed by some or all words of its column's name, separated by colons:
`eval/fid@50k:ddim50:ema`. It means the final value, or the best one if the word `best` is among
them.
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

Protocol = tuple[str, str]  # as protocol_of returns it


class Ordered(NamedTuple):
    """Runs sorted by a figure.

    Attributes:
        column: Name of the figure's column in the table.
        compared: The runs: first those with the figure, better ones first (lower ones if neither
            is better), then those without, then those that failed.
        values: Each run's value as in the table; None if it has none.
        sign: 1 if lower values come first, else -1.
        ranked: Number of runs with the figure that have not failed; they come first.
        note: One line about the other runs; None if there are none.
    """

    column: str
    compared: list[Compared]
    values: list[Any]
    sign: int
    ranked: int
    note: str | None


def by(compared: Sequence[Compared], metric: str, key: str) -> Ordered:
    """Sorts runs by METRIC.

    Args:
        compared: The runs.
        metric: METRIC as described above.
        key: The key of the command line, for errors.

    Raises:
        ValueError: If there is no such figure, or METRIC matches figures of several protocols.
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
        f"{key}={metric}: {ranked} of {len(compared)} runs are sorted by it; after them "
        f"{', then '.join(behind)}"
        if behind
        else None,
    )


def by_mean(seeds: Sequence[Row], ordered: Ordered) -> list[Row]:
    """Sorts rows of means over seeds in the same order, rows without the figure last."""

    def place(row: Row) -> tuple[Any, ...]:
        mean = row.get(f"{ordered.column} mean", row.get(ordered.column))
        return (0, *_place(mean, ordered.sign)) if _ranks(mean) else (1,)

    return sorted(seeds, key=place)


def best(compared: Sequence[Compared], metric: str) -> Ordered:
    """Sorts runs by METRIC, the best run first.

    Raises:
        ValueError: If no run has the figure, or neither lower nor higher values are better.
    """
    if not _is_figure(metric):
        raise ValueError(
            f"best={metric} is no figure, and settings are neither better nor worse; give loss or "
            "eval/NAME, and words of its protocol as in loss:WORD or eval/NAME@WORD:WORD"
        )
    ordered = by(compared, metric, "best")
    if better(ordered.column.partition("@")[0].split()[0]) is None:
        raise ValueError(
            f"best={metric}: neither low nor high values of {ordered.column} are better; "
            "order_by= can sort by it"
        )
    if not ordered.ranked:
        raise ValueError(f"best={metric}: only failed runs have this figure, or it is not finite")
    return ordered


def choose(compared: Sequence[Compared], metric: str, key: str) -> dict[str, Protocol]:
    """Returns the columns that METRIC matches, one per protocol.

    Raises:
        ValueError: If it matches none; the message names the figures that there are.
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
    """Returns a column's name in the form that users type as METRIC."""
    return ("" if protocol[0] == "loss" else "eval/") + ":".join(_words(column))


def setting(compared: Sequence[Compared], name: str, key: str) -> str:
    """Returns the setting with this name, which is a dotted key or its unique last part.

    Raises:
        ValueError: If there is none, or several have that last part.
    """
    keys = [setting for one in compared for setting in one.settings]
    return _named(keys, name, f"{key}={name} is not a figure (loss, eval/NAME) or a setting")


def differing(compared: Sequence[Compared], name: str, key: str) -> str:
    """Returns the setting with this name, as `setting` does, among those that differ except seed.

    Raises:
        ValueError: If there is none, or several have that last part.
    """
    keys = [setting for one in differences(compared) for setting in one if setting != "seed"]
    return _named(keys, name, f"{key}={name} is not a setting, other than the seed, that differs")


def _named(keys: Sequence[str], name: str, otherwise: str) -> str:
    keys = list(dict.fromkeys(keys))
    found = [name] if name in keys else [key for key in keys if key.rpartition(".")[2] == name]
    if name == "lr" and "optimizer.lr" in found:  # a user's own schedule may have an lr, too
        return "optimizer.lr"
    if len(found) > 1:
        raise ValueError(f"{otherwise}: it could be any of {', '.join(found)}")
    if not found:
        raise ValueError(f"{otherwise} in these runs{nearest(name, keys)}")
    return found[0]


def _is_figure(metric: str) -> bool:
    return metric.startswith("eval/") or metric.split(":")[0] == "loss"


def _figures(
    compared: Sequence[Compared], metric: str, key: str
) -> tuple[str, list[float | At | None], int]:
    """Returns METRIC's column, each run's value in it, and 1 if lower is better, else -1."""
    words = metric.split(":")
    bests = "best" in words[1:]
    found = choose(compared, ":".join(word for word in words if word != "best"), key)
    if len(found) > 1:
        names = ", ".join(name_of(*one) for one in found.items())
        raise ValueError(
            f"{key}={metric} matches figures of {len(found)} protocols, which do not compare: give "
            f"one of {names}, or words that only one of them has"
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
    """Returns the words of a name in a form safe for Hydra and shells: seed-0 for seed=0."""
    return [re.sub(r"[^\w.@+/-]+", "-", word) for word in re.split(r"[:\s]+", name.strip())]


def _ranks(value: Any) -> bool:
    """Whether a value can be sorted: None and values that are not finite cannot."""
    number = value.value if isinstance(value, At) else value
    return number is not None and not (isinstance(number, float) and not math.isfinite(number))


def _place(value: Any, sign: int) -> tuple[Any, ...]:
    number = value.value if isinstance(value, At) else value
    if isinstance(number, int | float):
        return (0, sign * number)
    return (1, format_value(number))
