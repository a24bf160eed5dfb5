"""python -m ddpm.compare: runs side by side."""

import shutil

from ddpm.config.cli import command
from ddpm.config.compose import Composed


def task(composed: Composed) -> None:
    from ddpm.compare.run import CompareConfig, carry_out

    carry_out(CompareConfig.of(composed), composed, width=shutil.get_terminal_size((200, 24)).columns)


main = command(
    "compare",
    task,
    "Compare runs: what differs between them and what they came to. With no runs= it lists all there are, newest first.",
    [
        "python -m ddpm.compare",
        "python -m ddpm.compare runs='outputs/quickstart-digits/optimizer.lr*' plot=true grid=true",
        "python -m ddpm.compare runs=[DIR,DIR] to=tables sampler=ancestral",
    ],
)

if __name__ == "__main__":
    main()
