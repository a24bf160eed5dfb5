"""Launching the jobs of a sweep, and stopping them; each has an outcome, however it all ends."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig

from ddpm.config import search, submitit_jobs
from ddpm.config.explain import explain
from ddpm.config.sweeps import HERE, Facts, Outcome, as_job, left
from ddpm.system import relay, signals
from ddpm.system.internals import end_loky_workers, start_loky_trackers, submit_to_slurm
from ddpm.system.signals import Preempted
from ddpm.system.text import say


@dataclass(frozen=True)
class Returned:
    """What a launcher gives back of a job, as Hydra's JobReturn.

    Attributes:
        return_value: How the job ended; for a search its score, None where it has none.
    """

    return_value: Outcome | float | None


@dataclass
class Sweep:
    """The jobs of one command line.

    Attributes:
        facts: What to show of a job, by column.
        heeds: Whether a job heeds signals, so that one can stop the sweep.
        wants_traceback: Whether an error is to be raised, not told in a line.
        check: Looks at the first jobs of a search, before they start.
        scored: Says what a search goes by; None where there is no such thing.
        ended: How those ended that ran in this process, by their number.
        outcomes: How all ended, in their order.
        scores: What a search went by, by the job's number.
    """

    facts: Facts
    heeds: bool
    wants_traceback: bool
    check: Callable[[Callable[[list[str]], DictConfig], Sequence[list[str]]], None]
    scored: search.Scored | None = None
    ended: dict[int, Outcome] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    scores: dict[int, search.Score] = field(default_factory=dict)
    _held: ExitStack = field(default_factory=ExitStack)

    def launch(
        self,
        sweeper: DictConfig,
        launcher: Any,
        compose_job: Callable[[list[str]], DictConfig],
        jobs: Sequence[list[str]],
        first: int,
    ) -> list[Returned]:
        """Launches jobs, and waits for them.

        Args:
            sweeper: The settings of the one that asks for them.
            launcher: Hydra's.
            compose_job: Composes the overrides of a job.
            jobs: The overrides of each job.
            first: The number of the first one.

        Raises:
            Exception: What the launcher raises, where no job got under way.
            ValueError: For a search that cannot be.
            Preempted: When a search is told to stop, which nothing else would end.
        """
        learns = search.learns(sweeper)
        if learns and first == 0:
            search.check(sweeper, self.scored)
            self.check(compose_job, jobs)
        returned = self._launch(launcher, compose_job, jobs, first)
        outcomes: list[Outcome] = [one.return_value for one in returned]
        self.outcomes += outcomes
        if not learns:
            return returned
        if signals.noted():
            raise Preempted("the search was told to stop")
        for number, outcome in enumerate(outcomes, first):
            if not outcome.code and self.scored is not None:
                with as_job(compose_job(list(jobs[number - first])), number) as composed:
                    self.scores[number] = self.scored(composed)
                search.check_score(sweeper, self.scores[number])
        values = {number: score.value for number, score in self.scores.items()}
        return [Returned(values.get(number)) for number in range(first, first + len(jobs))]

    def _launch(
        self,
        launcher: Any,
        compose_job: Callable[[list[str]], DictConfig],
        jobs: Sequence[list[str]],
        first: int,
    ) -> list[Any]:
        """Launches jobs, and waits for them.

        A launcher that raises keeps what it knows to itself. So what is missing is asked of the
        runs' folders.
        """
        if type(launcher).__name__ == "SlurmLauncher":
            return self._on_slurm(launcher, compose_job, jobs, first)
        if not (self.heeds and type(launcher).__name__ in HERE):
            return launcher.launch(jobs, first)
        self._held.enter_context(signals.listening())
        error: Exception | None = None
        try:
            with _telling(launcher):
                if not signals.noted():
                    for number, done in enumerate(launcher.launch(jobs, first), first):
                        if done.return_value is not None:  # it was started
                            self.ended[number] = done.return_value
        except Preempted:  # raised by a job in this process
            pass
        except Exception as caught:
            error = caught
            if self.wants_traceback:
                raise
        code = signals.CARRIES_ON if signals.noted() else 1
        for number, words in enumerate(jobs, first):
            if number not in self.ended:
                with as_job(compose_job(words), number) as composed:
                    self.ended[number] = left(composed, self.facts, code, lost=error is not None)
        outcomes = [self.ended[number] for number in range(first, first + len(jobs))]
        if error is not None and not signals.noted():
            if all(one.facts["status"] == "not started" for one in outcomes):
                raise error
            say(f"error: {explain(error)}", to_error=True)
        return [Returned(one) for one in outcomes]

    def _on_slurm(
        self,
        launcher: Any,
        compose_job: Callable[[list[str]], DictConfig],
        jobs: Sequence[list[str]],
        first: int,
    ) -> list[Returned]:
        def of_folder(number: int) -> Outcome:
            with as_job(compose_job(jobs[number]), first + number) as composed:
                outcome = left(composed, self.facts, 1, lost=True)
            told = outcome.facts["status"] == "preempted"
            return replace(outcome, code=signals.CARRIES_ON) if told else outcome

        submitted = submit_to_slurm(launcher, jobs, first)
        return [Returned(one) for one in submitit_jobs.wait_for(submitted, of_folder)]

    def close(self) -> None:
        """Lets go of the signals."""
        self._held.close()


@contextmanager
def _telling(launcher: Any) -> Iterator[None]:
    """Tells the processes of jobs to stop when this one is told, and waits for their end."""
    kind = type(launcher).__name__
    if kind == "JoblibLauncher" and _joblib_starts_processes(launcher):
        start_loky_trackers()
        with relay.passing_on(relay.own_children):
            try:
                yield
            finally:
                end_loky_workers()
    elif kind == "LocalLauncher":
        with relay.passing_on(lambda: relay.descendants("submitit.core._submit")):
            try:
                yield
            finally:
                relay.wait_for(relay.descendants("submitit.local._local"))
    else:
        yield


def _joblib_starts_processes(launcher: Any) -> bool:
    from joblib import effective_n_jobs

    return effective_n_jobs(int(launcher.joblib["n_jobs"])) > 1
