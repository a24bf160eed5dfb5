"""python -m ddpm.study: try a claim of a paper, and say whether it holds here."""

import re
import sys

from ddpm.config.cli import command, lazily

_main = command(
    "study",
    lazily("ddpm.study.run.run"),
    (
        "Try a paper's claim small, with seeds: trains and measures what experiments/studies/NAME "
        "lists, and says whether the claim holds here. Typed again, carry on."
    ),
    [
        "python -m ddpm.study",
        "python -m ddpm.study ho_objectives",
        "python -m ddpm.study ho_objectives study.seeds=6",
    ],
    heeds=True,
)


def main() -> None:
    """Takes a bare word, or a path to a YAML file, for the study's name."""
    sys.argv[1:] = [
        f"study.name={word}" if re.fullmatch(r"[A-Za-z]\w*|[^=]+\.yaml", word) else word
        for word in sys.argv[1:]
    ]
    _main()


if __name__ == "__main__":
    main()
