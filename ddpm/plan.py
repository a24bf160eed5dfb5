"""python -m ddpm.plan: what a run will be, before anything is downloaded or trained, and whether the recipe's expectations hold."""

from ddpm.cli import Composed, command


def task(composed: Composed) -> None:
    from ddpm.planning import plan

    plan(composed)


main = command("plan", task)

if __name__ == "__main__":
    main()
