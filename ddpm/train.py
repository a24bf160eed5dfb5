"""python -m ddpm.train: train a run, carry it on where it stopped, or say that it is complete."""

from ddpm.cli import Composed, command


def task(composed: Composed) -> None:
    from ddpm import build
    from ddpm.config import training_config
    from ddpm.run_folder import locate
    from ddpm.training_run import carry_out

    config = training_config(composed)
    build.check(config)
    carry_out(config, locate(config, composed), composed)


main = command("config", task)

if __name__ == "__main__":
    main()
