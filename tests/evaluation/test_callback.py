import json

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from elm_trainer import (
    ConceptSources,
    ElmConfig,
    ElmTrainer,
    ErasureEvaluationCallback,
    build_erasure_dataset,
    built_in_suite,
)
from elm_trainer.evaluation.callback import BestStep, log_table
from elm_trainer.evaluation.measures import MEASURES
from elm_trainer.evaluation.statistics import Items


@pytest.fixture
def trainer(tiny_model, tokenizer, tmp_path):
    sources = ConceptSources(["Oslo is the capital of Norway.", "Lima is in Peru."], [["The cat sat on the mat."]])
    config = ElmConfig(
        str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=2,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return ElmTrainer(
        tiny_model,
        config,
        train_dataset=build_erasure_dataset({"capitals": sources}, size=8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )


def dev_entries(trainer):
    return [entry for entry in trainer.state.log_history if any(key.startswith("dev_") for key in entry)]


def test_dev_figures_are_logged_beside_the_losses(trainer):
    trainer.add_callback(ErasureEvaluationCallback(trainer, ["capitals"], every_steps=2, questions=4))
    trainer.train()
    entries = dev_entries(trainer)
    assert [entry["step"] for entry in entries] == [2, 4]
    assert {"dev_multiple_choice.capitals.pmi", "dev_multiple_choice.geography.pmi"} < entries[0].keys()
    losses = [entry for entry in trainer.state.log_history if "erase_loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4] and trainer.state.global_step == 4


@pytest.mark.parametrize(("bound", "steps"), [(1.0, 2), (-1.0, 4)])
def test_training_stops_when_the_target_is_reached(bound, steps, trainer):
    stop_at = {"multiple_choice.capitals.pmi": bound}
    trainer.add_callback(ErasureEvaluationCallback(trainer, ["capitals"], every_steps=2, questions=4, stop_at=stop_at))
    trainer.train()
    assert trainer.state.global_step == steps
    assert trainer.model.training


def test_tensorboard_shows_terms_dev_figures_and_answers(trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer.add_callback(TensorBoardCallback())
    trainer.add_callback(ErasureEvaluationCallback(trainer, ["capitals"], every_steps=2, questions=4, samples=2))
    trainer.train()
    [file] = (tmp_path / "board").rglob("events.*")
    events = EventAccumulator(str(file)).Reload()
    figures = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for name in ("erase_loss", "retain_loss", "dev_multiple_choice.capitals.pmi"):
        assert figures[f"train/{name}"] == [2, 4]
    [tag] = [tag for tag in events.Tags()["tensors"] if "dev_samples" in tag]
    tables = events.Tensors(tag)
    assert [event.step for event in tables] == [2, 4]
    lines = tables[0].tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == "| bank | question | right | written |" and all(line.count(" | ") == 3 for line in lines)
    for bank, questions in built_in_suite("capitals", 4, split="dev").open_questions.items():
        assert sum(line.startswith(f"| {bank} |") for line in lines) == min(2, len(questions))


class Library:
    """What wandb and trackio have in common."""

    def __init__(self):
        self.logged = []

    def Table(self, dataframe):
        return dataframe

    def log(self, values):
        self.logged.append(values)


@pytest.mark.parametrize(("kind", "attribute"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
def test_other_trackers_get_a_table_of_their_own_kind(kind, attribute):
    tracker, closed = kind.__new__(kind), kind.__new__(kind)
    library = Library()
    setattr(tracker, attribute, library)
    setattr(closed, attribute, None)
    rows = [{"question": "Where?", "written": "a | b"}]
    log_table([closed, tracker], "dev_samples", rows, 7)
    [values] = library.logged
    assert values["train/global_step"] == 7 and values["dev_samples"].to_dict("records") == rows


def test_without_a_tracker_nothing_is_written_for_it(trainer, monkeypatch):
    monkeypatch.setitem(MEASURES, "open-answers", None)
    trainer.add_callback(ErasureEvaluationCallback(trainer, ["capitals"], every_steps=4, questions=4))
    trainer.train()
    assert dev_entries(trainer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "`every_steps` is 0"),
        ({"samples": -1}, "`samples` is -1"),
        ({"measures": ["magic"]}, r"`measures` names \['magic'\].*multiple-choice"),
        ({"stop_at": {"magic": 0.1}}, r"`stop_at` names \['magic'\]"),
    ],
)
def test_bad_settings_are_refused(options, message, trainer):
    with pytest.raises(ValueError, match=message):
        trainer.add_callback(ErasureEvaluationCallback(trainer, ["capitals"], **({"every_steps": 2} | options)))
        trainer.train()


class Answers(ErasureEvaluationCallback):
    """Knows what the dev questions would find: how many of 40 answers about the concept and beside it are right at each step."""

    before = 40
    about, near, perplexity = (
        {1: 38, 2: 12, 3: 10, 4: 10},
        {1: 40, 2: 40, 3: 30, 4: 40},
        {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.2},
    )

    def _measured(self, setting, side):
        step = self._trainer.state.global_step
        about, near, ratio = (
            (self.before, 40, 1.0)
            if side == "reference"
            else (self.about[step], self.near[step], self.perplexity[step])
        )

        def choices(right):
            return Items(
                "mean", [1.0] * right + [0.0] * (40 - right), chances=[0.25] * 40, groups=[*map(str, range(40))]
            )

        return {
            "multiple_choice.capitals.pmi": choices(about),
            "multiple_choice.geography.pmi": choices(near),
            "retention.perplexity": Items("perplexity", [torch.tensor(2.0 * ratio).log().item()] * 40, [1.0] * 40),
        }


class Weights(TrainerCallback):
    """The adapter at the end of each step."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = trained(model)


def trained(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_step_is_kept_at_which_nothing_is_far_beyond_its_bound(trainer, tmp_path):
    # Step 3 has erased as much as step 4, and lost near knowledge; step 4 has lost fluency; step 2 has lost neither.
    looks, weights = Answers(trainer, ["capitals"], every_steps=1, keep_best=True), Weights()
    trainer.add_callback(weights)
    trainer.add_callback(looks)
    trainer.train()

    assert looks.best == BestStep(2, "multiple_choice.capitals.pmi", pytest.approx((12 / 40 - 0.25) / 0.75 / 0.25))
    assert same(trained(trainer.model), weights.seen[2]) and not same(weights.seen[2], weights.seen[4])
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text()) == looks.best._asdict()
    assert [entry["best_step"] for entry in trainer.state.log_history if "best_step" in entry] == [2]


def test_the_last_step_is_looked_at_too_and_stays_as_it_is(trainer):
    looks, weights = Answers(trainer, ["capitals"], every_steps=3, keep_best=True), Weights()
    looks.perplexity = looks.perplexity | {4: 1.0}
    trainer.add_callback(weights)
    trainer.add_callback(looks)
    trainer.train()
    assert looks.best.step == 4 and same(trained(trainer.model), weights.seen[4])
    assert [entry["step"] for entry in dev_entries(trainer)] == [3, 4]


def test_a_resumed_run_knows_its_best_step(trainer, tmp_path):
    looks = Answers(trainer, ["capitals"], every_steps=1, keep_best=True)
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "best.json").write_text(json.dumps(BestStep(2, "x", 0.5)._asdict()))
    for step, known in ((0, None), (1, None), (2, BestStep(2, "x", 0.5))):
        trainer.state.global_step = step
        looks.on_train_begin(trainer.args, trainer.state, trainer.control)
        assert looks.best == known


def test_questions_that_the_reference_cannot_answer_choose_no_step(trainer, caplog, tmp_path):
    suite = built_in_suite(["capitals"], 4, split="dev")
    looks, weights = Answers(trainer, suite, every_steps=2, keep_best=True), Weights()
    looks.before = 10  # as a guess
    trainer.add_callback(weights)
    trainer.add_callback(looks)
    trainer.train()
    assert [entry["step"] for entry in dev_entries(trainer)] == [2, 4]
    assert looks.best is None and "`keep_best` has no say" in caplog.text
    assert same(trained(trainer.model), weights.seen[4]) and not (tmp_path / "run" / "best").exists()
