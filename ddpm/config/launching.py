"""Launches and stops the jobs of a sweep; every job gets an outcome, however the sweep ends."""

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
    """A job's result, in place of Hydra's JobReturn.

    Attributes:
        return_value: The job's outcome; for a search its score, or None if it has none.
    """

    return_value: Outcome | float | None


@dataclass
class Sweep:
    """The jobs of one command line.

    Attributes:
        facts: Returns a job's columns of the table.
        heeds: Whether jobs react to signals, so that a signal stops the sweep.
        wants_traceback: Whether to raise an error instead of printing one line.
        check: Checks the first jobs of a search before they start; see sweeps.check_jobs.
        scored: Returns a job's score; None if the command has no score.
        ended: Outcomes of jobs that ran in this process, by job number.
        outcomes: Outcomes of all jobs, in job order.
        scores: Scores of a search's complete jobs, by job number.
    """

    facts: Facts
    heeds: bool
    wants_traceback: bool
    check: Callable[..., None]
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
        """Launches jobs and waits for them.

        Args:
            sweeper: The sweeper's settings.
            launcher: Hydra's launcher.
            compose_job: Composes the overrides of a job.
            jobs: The overrides of each job.
            first: The number of the first job.

        Raises:
            Exception: The launcher's error, if no job started.
            ValueError: If the search is impossible.
            Preempted: If a search is told to stop; the sweeper would go on asking for jobs.
        """
        learns = search.learns(sweeper)
        if learns and first == 0:
            search.check(sweeper, self.scored)
            self.check(compose_job, jobs, distinct=False)
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
        """Launches jobs and waits for them.

        A launcher that raises returns no outcomes. The runs' folders supply those that are missing.
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
                        if done.return_value is not None:  # the job started
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
        """Releases the signals."""
        self._held.close()


@contextmanager
def _telling(launcher: Any) -> Iterator[None]:
    """Passes a stop signal on to the processes of jobs, and waits for them to end."""
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
