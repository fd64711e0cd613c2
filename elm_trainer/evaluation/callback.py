"""A light evaluation during training, which can stop it."""

from collections.abc import Mapping, Sequence

from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .measures import MEASURES, Setting
from .pair import ModelPair
from .suite import built_in_suite
from .verdict import RANKING_RULES


logger = logging.get_logger(__name__)


class ErasureEvaluationCallback(TrainerCallback):
    """Ask questions of the *dev* split every few steps, log the metrics as `dev_<name>`, and stop on a target.

    The test split stays unseen until the report at the end. The processes of a launch share the questions.

    Args:
        trainer ([`~transformers.Trainer`]): Trainer whose model is asked; add the callback with `trainer.add_callback`.
        concepts (`Sequence[str]`): Built-in concepts that are erased.
        every_steps (`int`, *optional*, defaults to `10`): Steps between two evaluations.
        questions (`int`, *optional*, defaults to `60`): Questions per bank; half as many open questions.
        measures (`Sequence[str]`, *optional*, defaults to `("multiple-choice",)`): Names in `MEASURES`.
        stop_at (`Mapping[str, float]`, *optional*): Training stops once every metric named here is at or below its value,
            e.g. `{"worst.pmi": 0.35}`. Beside what is measured there are `worst.pmi` and `worst.log_likelihood`: the
            largest accuracy in any way of asking for a concept.

    Raises:
        ValueError: for an unknown measure, a `stop_at` that is not measured, or `every_steps` below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        concepts: Sequence[str],
        *,
        every_steps: int = 10,
        questions: int = 60,
        measures: Sequence[str] = ("multiple-choice",),
        stop_at: Mapping[str, float] | None = None,
    ):
        if every_steps < 1:
            raise ValueError(f"`every_steps` is {every_steps}: it must be at least 1.")
        if unknown := [name for name in measures if name not in MEASURES]:
            raise ValueError(f"`measures` names {unknown}, which do not exist; use: {', '.join(MEASURES)}.")
        self._trainer = trainer
        self._suite = built_in_suite(concepts, questions, split="dev")
        self._every_steps = every_steps
        self._measures = list(measures)
        self._stop_at = dict(stop_at or {})

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._every_steps:
            return
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        setting = Setting(
            ModelPair(model), self._trainer.processing_class, self._suite, {}, 0.0, 16, args.seed, over_ranks=True
        )
        figures = {
            key: items.figure().value
            for name in self._measures
            for key, items in MEASURES[name](setting, "erased").items()
            if not key.endswith(".removed")
        }
        for rule in RANKING_RULES:
            asked = [f"multiple_choice.{bank}.{rule}" for bank in self._suite.named("erased")]
            if measured := [figures[name] for name in asked if name in figures]:
                figures[f"worst.{rule}"] = max(measured)
        if missing := sorted(self._stop_at.keys() - figures.keys()):
            raise ValueError(f"`stop_at` names {missing}, which are not measured; use: {', '.join(figures)}.")
        # In training mode SFTTrainer.log would mix these with the means of the step's metrics and clear the latter;
        # and every log takes back the wish for the step's own.
        should_log = control.should_log
        model.eval()
        try:
            self._trainer.log({f"dev_{name}": value for name, value in figures.items()})
        finally:
            model.train()
        control.should_log = should_log
        if self._stop_at and all(figures[name] <= bound for name, bound in self._stop_at.items()):
            logger.info(f"Stopping at step {state.global_step}: {self._stop_at} reached on the dev split.")
            control.should_training_stop = True
