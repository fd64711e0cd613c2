"""The end of a comparison's worker that a `Trainer` calls."""

import time

from transformers import TrainerCallback

from .workers import Pacer


class PacedTraining(TrainerCallback):
    """Hands the steps of a `Trainer` to a [`Pacer`]."""

    def __init__(self, pacer: Pacer):
        self._pacer = pacer

    def on_train_begin(self, args, state, control, **kwargs):
        if not self._pacer.start():
            control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        if not self._pacer.step():
            control.should_training_stop = True


class Lap(TrainerCallback):
    """Notes how long it took until training begins. It must stand before [`PacedTraining`].

    Args:
        pacer ([`Pacer`]): Where it is noted.
        name (`str`): What took so long.
    """

    def __init__(self, pacer: Pacer, name: str):
        self._pacer, self._name, self._started = pacer, name, time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._pacer.lap(self._name, time.perf_counter() - self._started)
