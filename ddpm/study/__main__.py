"""python -m ddpm.study: test a paper's claims, and say whether they hold here."""

import re
import sys

from ddpm.config.cli import command, lazily

_main = command(
    "study",
    lazily("ddpm.study.run.run"),
    (
        "Test a paper's claims at a small scale: train and measure what "
        "experiments/studies/NAME.yaml lists, over several seeds, and say which claims hold here. "
        "Run it again to resume."
    ),
    [
        "python -m ddpm.study",
        "python -m ddpm.study ho_objectives",
        "python -m ddpm.study ho_objectives study.seeds=6",
    ],
    heeds=True,
)


def main() -> None:
    """Runs the command; a bare word, or a path to a YAML file, is the study's name."""
    sys.argv[1:] = [
        f"study.name={word}" if re.fullmatch(r"[A-Za-z]\w*|[^=]+\.yaml", word) else word
        for word in sys.argv[1:]
    ]
    _main()


if __name__ == "__main__":
    main()
