"""Stops training at a given step, for tests of resuming."""

from vdit.runtime.preemption import Preemption


class StopAt(Preemption):
    """Requests a stop after a step, as a signal would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def reached(self, step: int) -> bool:
        return step == self.step
