"""Dev questions during training: they are logged, and choose the step at which to stop, or the one to keep."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pandas import DataFrame
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ..files import read_object, write_json
from .measures import MEASURES, Setting
from .pair import ModelPair, Side, in_shards
from .statistics import Items, compared
from .suite import EvaluationSuite, built_in_suite
from .tables import markdown_table
from .verdict import CRITERIA, RANKING_RULES, Criteria, counted, judge, multiple


logger = logging.get_logger(__name__)
BEST_FOLDER, BEST_FILE = "best", "best.json"
TRACKERS = (TensorBoardCallback, WandbCallback, TrackioCallback)


class BestStep(NamedTuple):
    """The step that is kept.

    Attributes:
        step (`int`): The step.
        figure (`str`): The metric that is the farthest from its bound there.
        multiple (`float`): How far, as a multiple of the bound; at most 1 where all bounds are kept.
    """

    step: int
    figure: str
    multiple: float


class ErasureEvaluationCallback(TrainerCallback):
    """Ask questions of the *dev* split every few steps, log the metrics as `dev_<name>`, stop on a target, keep the best step.

    The test split stays unseen until the report at the end. The processes of a launch share the questions.

    Args:
        trainer ([`~transformers.Trainer`]): Trainer whose model is asked; add the callback with `trainer.add_callback`.
        concepts (`str`, `Sequence[str]` or [`EvaluationSuite`]): Built-in concepts that are erased, or a suite of dev
            questions of your own.
        every_steps (`int`, *optional*, defaults to `10`): Steps between two evaluations.
        questions (`int`, *optional*, defaults to `60`): Questions per bank; half as many open questions.
        measures (`Sequence[str]`, *optional*): Names in `MEASURES`; `("multiple-choice",)` by default, and with
            `keep_best` also `"specificity"`.
        stop_at (`Mapping[str, float]`, *optional*): Training stops once every metric named here is at or below its
            value, e.g. `{"worst.pmi": 0.35}`. Beside what is measured there are `worst.pmi` and
            `worst.log_likelihood`: the largest accuracy in any way of asking for a concept.
        keep_best (`bool`, *optional*, defaults to `False`): Keep the adapter of the best step in `output_dir/best`, and
            load it when training ends; the last step is looked at, too. The best step is the one whose worst check is the
            least beyond its bound: of all checks of the verdict ([`judge`]) that are measured and count, of innocence as
            of specificity, the largest multiple of its bound is held against that of other steps.
        criteria ([`Criteria`], *optional*): Bounds by which the best step is chosen.
        samples (`int`, *optional*, defaults to `3`): Open questions of each bank whose answers go to the trackers of
            `report_to` (TensorBoard, Weights & Biases, trackio) as the table `dev_samples`. Without a tracker none is asked.

    Attributes:
        best ([`BestStep`]): The best step so far; `None` without `keep_best`, before the first look, and where the dev
            questions can tell nothing about innocence, since the reference does not know their answers.

    Raises:
        ValueError: for an unknown measure, a `stop_at` that is not measured, `every_steps` below 1, `samples` below 0, or
            `keep_best` with weights in shards.
    """

    def __init__(
        self,
        trainer: Trainer,
        concepts: str | Sequence[str] | EvaluationSuite,
        *,
        every_steps: int = 10,
        questions: int = 60,
        measures: Sequence[str] | None = None,
        stop_at: Mapping[str, float] | None = None,
        keep_best: bool = False,
        criteria: Criteria | None = None,
        samples: int = 3,
    ):
        if every_steps < 1:
            raise ValueError(f"`every_steps` is {every_steps}: it must be at least 1.")
        if measures is None:
            measures = ("multiple-choice", "specificity") if keep_best else ("multiple-choice",)
        if unknown := [name for name in measures if name not in MEASURES]:
            raise ValueError(f"`measures` names {unknown}, which do not exist; use: {', '.join(MEASURES)}.")
        if samples < 0:
            raise ValueError(f"`samples` is {samples}: it must be at least 0.")
        self._trainer = trainer
        if not isinstance(concepts, EvaluationSuite):
            concepts = built_in_suite(concepts, questions, split="dev")
        self._suite: EvaluationSuite = concepts
        shown = {name: asked[:samples] for name, asked in self._suite.open_questions.items()}
        self._sampled = replace(self._suite, open_questions=shown)
        self._every_steps = every_steps
        self._measures = list(measures)
        self._stop_at = dict(stop_at or {})
        self._keep_best, self._criteria = keep_best, criteria
        self._before: dict[str, Items] = {}
        self.best: BestStep | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        path = self._folder / BEST_FILE
        if self._keep_best and state.global_step and path.exists():
            best = BestStep(**read_object(path))
            self.best = best if best.step <= state.global_step else None

    def on_step_end(self, args, state, control, **kwargs):
        at_last = self._keep_best and state.global_step >= state.max_steps
        if state.global_step % self._every_steps and not at_last:
            return
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        if self._keep_best and in_shards(model):
            raise ValueError(
                "`keep_best` is True, but the model's weights lie in shards (FSDP, ZeRO-3), into which no adapter is loaded: "
                "set it to False, or train without shards."
            )
        setting = Setting(
            ModelPair(model), self._trainer.processing_class, self._suite, {}, 0.0, 16, args.seed, over_ranks=True
        )
        items = self._measured(setting, "erased")
        figures = {key: one.estimate().value for key, one in items.items()}
        for rule in RANKING_RULES:
            asked = [f"multiple_choice.{bank}.{rule}" for bank in self._suite.named("erased")]
            if measured := [figures[name] for name in asked if name in figures]:
                figures[f"worst.{rule}"] = max(measured)
        if missing := sorted(self._stop_at.keys() - figures.keys()):
            raise ValueError(f"`stop_at` names {missing}, which are not measured; use: {', '.join(figures)}.")
        self._log({f"dev_{name}": value for name, value in figures.items()}, control)
        # Every process has the trackers' callbacks, and all must ask; only those of the first have something to write to.
        trackers = [one for one in self._trainer.callback_handler.callbacks if isinstance(one, TRACKERS)]
        if trackers and any(self._sampled.open_questions.values()):
            rows = self._samples(replace(setting, suite=self._sampled))
            if state.is_world_process_zero:
                log_table(trackers, "dev_samples", rows, state.global_step)
        if self._keep_best:
            self._before = self._before or self._measured(setting, "reference")
            self._look(items, state.global_step)
        if self._stop_at and all(figures[name] <= bound for name, bound in self._stop_at.items()):
            logger.info(f"Stopping at step {state.global_step}: {self._stop_at} reached on the dev split.")
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.best is None:
            return
        model: PeftModel = self._trainer.accelerator.unwrap_model(self._trainer.model)
        if self.best.step != state.global_step:
            name = model.active_adapter
            folder = self._folder if name == "default" else self._folder / name
            set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=name)
        self._log({"best_step": self.best.step, "best_multiple": self.best.multiple}, control)

    @property
    def _folder(self) -> Path:
        return Path(self._trainer.args.output_dir) / BEST_FOLDER

    def _measured(self, setting: Setting, side: Side) -> dict[str, Items]:
        return {
            key: items
            for name in self._measures
            for key, items in MEASURES[name](setting, side).items()
            if not key.endswith(".removed")
        }

    def _samples(self, setting: Setting) -> list[dict[str, str]]:
        items = MEASURES["open-answers"](setting, "erased")
        return [
            {"bank": bank, "question": question.prompt, "right": question.answer, "written": written}
            for bank, questions in setting.suite.open_questions.items()
            if questions
            for question, written in zip(questions, items[f"open_answers.{bank}"].texts, strict=True)
        ]

    def _look(self, items: Mapping[str, Items], step: int) -> None:
        """Keep the adapter as it is now if it is better than what was kept."""
        roles = self._suite.roles
        verdict = judge(compared({"reference": self._before, "erased": items}, roles), roles, self._criteria)
        if verdict["innocence"]["state"] is None:
            logger.warning_once(
                "`keep_best` has no say: the reference does not know the answers to the dev questions, so that they tell nothing "
                "about what is erased. The last step is kept."
            )
            return
        worst = max((check for name in CRITERIA for check in counted(verdict[name])), key=multiple)
        found = BestStep(step, worst["figure"], multiple(worst))
        if self.best is None or found.multiple < self.best.multiple:
            self.best = found
            self._trainer.save_model(str(self._folder))
            if self._trainer.args.should_save:
                write_json(self._folder / BEST_FILE, found._asdict())

    def _log(self, figures: dict[str, Any], control: Any) -> None:
        # In training mode SFTTrainer.log would mix these with the means of the step's metrics and clear the latter;
        # and every log takes back the wish for the step's own.
        should_log, model = control.should_log, self._trainer.accelerator.unwrap_model(self._trainer.model)
        model.eval()
        try:
            self._trainer.log(figures)
        finally:
            model.train()
        control.should_log = should_log


def log_table(trackers: Sequence[TrainerCallback], name: str, rows: Sequence[Mapping[str, str]], step: int) -> None:
    """Give a table to the trackers that are open: as text to TensorBoard, as their own kind of table to the others."""
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
            cells = [[" ".join(text.replace("|", r"\|").split()) for text in row.values()] for row in rows]
            tracker.tb_writer.add_text(name, "\n".join(markdown_table(list(rows[0]), cells)), step)
        elif not isinstance(tracker, TensorBoardCallback):
            # Which is how TRL logs tables; transformers gives the library no public name.
            library: Any = tracker._wandb if isinstance(tracker, WandbCallback) else tracker._trackio
            if library is not None:
                library.log({name: library.Table(dataframe=DataFrame(rows)), "train/global_step": step})
