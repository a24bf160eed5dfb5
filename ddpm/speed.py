"""How fast a run goes, and how long it has taken."""

import time


class Speed:
    """Images a second between reports, the time for samples and checkpoints left out; and the time that the run took in all.

    before: what `timed` said when an earlier start of the run got as far as `step`.
    """

    def __init__(self, step: int, batch_size: int, before: dict[str, float] | None) -> None:
        self._batch_size = batch_size
        self._steps, self._seconds = 0, 0.0
        self._started = time.perf_counter()
        self._before = before or {"seconds": 0.0, "images": 0, "seconds_in_steps": 0.0}
        self._all_steps, self._all_seconds = 0, 0.0
        self._resume(step)

    def _resume(self, step: int) -> None:
        self._from_step, self._from_time = step, time.perf_counter()

    def pause(self, step: int) -> None:
        """Leave out the time since `report` at this step."""
        self._resume(step)

    def since_last(self, step: int) -> float:
        self._steps += step - self._from_step
        self._seconds += time.perf_counter() - self._from_time
        speed = self._steps * self._batch_size / self._seconds if self._seconds else 0.0
        self._all_steps += self._steps
        self._all_seconds += self._seconds
        self._steps, self._seconds = 0, 0.0
        self._resume(step)
        return speed

    def timed(self) -> dict[str, float]:
        """Of all starts so far: seconds in all; and of the steps that were timed, their images and seconds."""
        return {
            "seconds": self._before["seconds"] + time.perf_counter() - self._started,
            "images": self._before["images"] + self._all_steps * self._batch_size,
            "seconds_in_steps": self._before["seconds_in_steps"] + self._all_seconds,
        }
