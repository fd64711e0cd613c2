import copy
import json
import logging as python_logging
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import concatenate_datasets

from elm_trainer import ConceptSources, build_erasure_dataset
from elm_trainer.files import json_sha256
from elm_trainer.methods.targets import default_targets_dir, precompute_targets

from ..distributed.launching import ON_CPU, accelerate
from ..processes import run
from .methods import METHODS, tiny, trained


ROOT = Path(__file__).parents[2]
RICH = dict(contexts_per_sample=2, plausibility=0.01, fact_share=0.5, eta=5.0)


@pytest.fixture
def make(tokenizer, dataset, settings, lora):
    """Makes a trainer on the same tiny model; a test names what is different."""

    def build(method="elm", *, model=None, rows=None, **fields):
        chosen = METHODS[method]
        return chosen.trainer(
            tiny("llama", len(tokenizer)) if model is None else model,
            settings(chosen.config, **{**chosen.fields, **fields}),
            train_dataset=dataset if rows is None else rows,
            processing_class=tokenizer,
            peft_config=None if hasattr(model, "peft_config") else lora,
        )

    return build


def store_of(trainer):
    targets = trainer.data_collator.targets
    return targets and targets.store


def forwards(model):
    """A list that grows with every forward of a model over rows, which are longer than what a new trainer is measured by."""
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: calls.extend([1] * (args[0].numel() > 16)))
    return calls


def step(trainer, inputs):
    """Loss and gradients of a batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


SWITCHES = {"elm": "precompute_targets", "npo": "precompute_ref_log_probs"}


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("elm", RICH),
        ("elm", RICH | {"eta": 500.0, "eta_end": 500.0}),
        ("elm", {"preset": "released", "eta": 1.0, "eta_end": 1000.0}),
        ("elm", {"retain_weight": 0.0}),
        ("elm", {"erase_weight": 0.0}),
        ("npo", {"beta": 0.5}),
    ],
)
def test_stored_and_live_targets_give_the_same_loss_and_gradients(method, fields, make):
    found = []
    for stored in (True, False):
        trainer = make(method, **fields, **{SWITCHES[method]: stored})
        assert (store_of(trainer) is not None) is stored
        generator = torch.Generator().manual_seed(1)
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.data = torch.randn(p.shape, generator=generator) / 10
        # The rows that were computed together, which are packed in the same way.
        inputs = trainer.on_device(trainer.data_collator(list(trainer.train_dataset)), sharing=True)
        found.append(step(trainer, inputs))
    (loss, gradients), (expected, expected_gradients) = found
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert scale > 0
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-5 * scale.item(), msg=name)


@pytest.mark.parametrize("method", SWITCHES)
def test_a_second_trainer_computes_nothing(method, make, tokenizer):
    model = tiny("llama", len(tokenizer))
    calls = forwards(model)
    first = store_of(make(method, model=model))
    assert len(calls) > 0
    second_model = tiny("llama", len(tokenizer))
    calls = forwards(second_model)
    second = store_of(make(method, model=second_model, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    assert calls == [] and second.folder == first.folder
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other) and one.keys() == other.keys()


def test_a_second_trainer_tunes_no_teachers(make, tokenizer):
    rows = build_erasure_dataset(
        {"capitals": ConceptSources("capitals", ["capitals-near"])}, size=8, processing_class=tokenizer
    )
    fields = dict(rows=rows, expert_steps=2, novice_steps=2)
    first = make(**fields)
    assert list(first.model.peft_config) == ["default"]
    model = tiny("llama", len(tokenizer))
    calls = forwards(model)
    second = make(model=model, **fields)
    assert calls == [] and store_of(second).folder == store_of(first).folder
    assert list(second.model.peft_config) == ["default"]
    before = trained(second.model)
    second.train()
    assert any(not torch.equal(p, before[name]) for name, p in trained(second.model).items())


def test_a_step_with_stored_targets_runs_the_model_once(make, tokenizer):
    model = tiny("llama", len(tokenizer))
    trainer = make(model=model)
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    step(trainer, inputs)
    calls = forwards(model)
    step(trainer, inputs)
    assert len(calls) == 1


def test_workers_of_the_data_loader_read_the_store(make):
    losses = []
    for workers in (0, 2):
        trainer = make(dataloader_num_workers=workers, max_steps=4)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-6)


TEACHERS = dict(expert_steps=1, eta=3.0)
CHANGED = {
    "eta": {"eta": 4.0},
    "eta_end": {"eta": 3.0, "eta_end": 4.0},
    "tau": {"tau": 1.5},
    "top_k": {"top_k": 49},
    "plausibility": {"plausibility": 0.1},
    "fact_share": {"fact_share": 0.5},
    "contexts_per_sample": {"contexts_per_sample": 2},
    "seed of the contexts": {"seed": 1},
    "no erase term": {"erase_weight": 0.0},
    "no retain term": {"retain_weight": 0.0},
    "retain_loss": {"retain_loss": "argmax"},
    "max_length": {"max_length": 5},
    "teachers": TEACHERS,
    "expert_steps": TEACHERS | {"expert_steps": 2},
    "teacher_learning_rate": TEACHERS | {"teacher_learning_rate": 1e-2},
    "teacher_rank": TEACHERS | {"teacher_rank": 4},
    "teacher_batch_size": TEACHERS | {"teacher_batch_size": 2},
    "seed of the teachers": TEACHERS | {"seed": 1},
    "autocast": {"bf16": True, "use_cpu": True},
}


def test_whatever_the_targets_depend_on_changes_the_folder(make):
    folders = {name: store_of(make(**fields)).folder for name, fields in ({"": {}} | CHANGED).items()}
    assert len(set(folders.values())) == len(CHANGED) + 1


def changed_weight(model):
    # Between the samples of the fingerprint.
    model.model.embed_tokens.weight.data[100, 3] += 1e-3
    return model


def changed_dtype(model):
    return model.to(torch.bfloat16)


def changed_attention(model):
    model.set_attn_implementation("eager")
    return model


def changed_config(model):
    model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": 5e5}
    return model


@pytest.mark.parametrize("change", [changed_weight, changed_dtype, changed_attention, changed_config])
def test_another_model_has_another_folder(change, make, tokenizer):
    folder = store_of(make()).folder
    assert store_of(make(model=change(tiny("llama", len(tokenizer))))).folder != folder


def test_other_rows_have_another_folder(make, dataset):
    folder = store_of(make()).folder
    assert store_of(make(rows=dataset.select([*range(1, 8), 0]))).folder != folder


def test_methods_do_not_share_a_folder(make):
    assert store_of(make("npo")).folder != store_of(make()).folder


def test_every_part_of_a_key_is_written_down_and_counts(make):
    store = store_of(make())
    key = json.loads((store.folder / "targets.json").read_text(encoding="utf-8"))["key"]
    assert store.folder.name == json_sha256(key)
    assert key["versions"] == {name: version(name) for name in ("torch", "transformers", "peft")}
    assert key["attention"] == "sdpa" and key["layout"]["format"] == 1 and key["device"] == "cpu"
    for name, value in key.items():
        changed = {**value, "more": 1} if isinstance(value, dict) else f"{value}!"
        assert json_sha256(key | {name: changed}) != store.folder.name


SAME = {
    "batch": {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 3, "max_steps": 8},
    "steps": {"max_steps": 100},
    "optimiser": {"learning_rate": 1.0, "warmup_steps": 3},
    "weights of the terms": {"erase_weight": 0.3, "retain_weight": 2.0, "consistency_weight": 0.0},
}


@pytest.mark.parametrize("name", SAME)
def test_what_they_do_not_depend_on_leaves_the_folder_as_it_is(name, make):
    assert store_of(make(**SAME[name])).folder == store_of(make()).folder


def test_an_adapter_that_was_trained_leaves_the_folder_and_the_targets_as_they_are(make, tmp_path):
    trainer = make()
    store = store_of(trainer)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    trainer.args.targets_dir = str(tmp_path / "others")
    again = precompute_targets(trainer, trainer.target_plan()).store
    assert again.folder.name == store.folder.name and again.folder != store.folder
    for one, other in zip(store, again, strict=True):
        for name, values in one.items():
            torch.testing.assert_close(values, other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({"max_steps": 2}, True),  # 2 steps of 4 are the 8 rows
        ({"max_steps": 1}, False),
        ({"max_steps": 1, "gradient_accumulation_steps": 2}, True),
        ({"max_steps": -1, "num_train_epochs": 1}, True),
        ({"max_steps": -1, "num_train_epochs": 0.9}, False),
        ({"max_steps": 1, "precompute_targets": True}, True),
        ({"max_steps": 2, "precompute_targets": False}, False),
        ({"max_steps": 1, "expert_steps": 1}, True),
    ],
)
def test_targets_are_stored_by_default_where_each_row_is_visited(fields, stored, make):
    assert (store_of(make(**fields)) is not None) is stored


def test_the_log_says_why_targets_are_made_in_the_step(make):
    records = []
    handler = python_logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = python_logging.getLogger("elm_trainer.methods.targets")
    logger.addHandler(handler)
    try:
        make(max_steps=1)
    finally:
        logger.removeHandler(handler)
    assert any("made in each step" in record and "visits 4 of 8 rows" in record for record in records)


def test_stores_lie_in_the_cache_of_datasets_or_where_they_are_wanted(make, tmp_path):
    assert store_of(make()).folder.parent == default_targets_dir()
    assert default_targets_dir().name == "elm_targets"
    assert store_of(make(targets_dir=str(tmp_path / "here"))).folder.parent == tmp_path / "here"


def test_a_damaged_file_is_made_again(make):
    store = store_of(make())
    whole = store.path_of(0).read_bytes()
    store.path_of(0).write_bytes(whole[:-3] + b"abc")
    assert store_of(make()).path_of(0).read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_named_with_the_ways_out(make, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"`targets_dir` '.*/file/inside'.*`precompute_targets=False`"):
        make(targets_dir=str(tmp_path / "file" / "inside"))


def test_a_folder_can_change_between_a_run_and_its_resumption(make, tmp_path):
    fields = dict(save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "run"))
    make(**fields).train()
    resumed = make(**fields, targets_dir=str(tmp_path / "moved"), precompute_targets=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


class Launched(NamedTuple):
    """What came of tests/methods/run_targets.py."""

    status: int
    errors: str
    notes: list[tuple[int, str, str]]

    def what(self, kind):
        """What the processes say of a kind: `"batch"`, `"loaded"`, `"holds"`, `"live"` or `"refused"`."""
        return [what for _, found, what in self.notes if found == kind]

    @property
    def computed(self):
        """Processes and sizes of the batches that were computed."""
        return sorted((rank, int(what)) for rank, kind, what in self.notes if kind == "batch")


def launch(log, *arguments, environment=None, launcher=None, processes=1, others=(), **fields):
    """Fork the processes, or start them with a launcher. `others` are fields of further trainers, one after the other."""
    command = [sys.executable, *(launcher or ()), "-m", "tests.methods.run_targets", str(log), *arguments]
    command += ["--fields", *map(json.dumps, (fields, *others))]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    if launcher:
        result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    else:
        result = run(command, processes=processes, env=variables)
    lines = [line.split(maxsplit=2) for line in log.read_text().splitlines()] if log.exists() else []
    notes = [(int(rank), kind, what) for rank, kind, what in lines]
    return Launched(result.returncode, result.stderr[-6000:], notes)


def test_a_killed_run_goes_on_with_the_next_file(tmp_path):
    killed = launch(tmp_path / "killed", "--kill-at", "2")
    assert killed.status == -signal.SIGKILL and killed.computed == [(0, 128)] * 2 and not killed.what("holds")
    resumed = launch(tmp_path / "resumed")
    assert resumed.status == 0, resumed.errors
    assert resumed.computed == [(0, 1), (0, 128)]
    whole = launch(tmp_path / "whole", targets_dir=str(tmp_path / "targets"))
    assert whole.what("holds") == resumed.what("holds") != []


@pytest.mark.distributed
@pytest.mark.parametrize("method", SWITCHES)
def test_two_processes_share_the_work_and_the_files(method, tmp_path):
    alone = launch(tmp_path / "alone", "--method", method)
    assert alone.status == 0, alone.errors
    assert alone.computed == [(0, 1), (0, 128), (0, 128)]
    targets = str(tmp_path / "targets")
    together = launch(tmp_path / "together", "--method", method, processes=2, targets_dir=targets)
    assert together.status == 0, together.errors
    assert together.computed == [(0, 1), (0, 128), (1, 128)]
    assert together.what("holds") == alone.what("holds") * 2
    again = launch(tmp_path / "again", "--method", method, processes=2)
    assert again.status == 0 and again.computed == [] and again.what("holds") == alone.what("holds") * 2


@pytest.fixture
def saved(tokenizer, tmp_path):
    tiny("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.distributed
def test_files_that_only_the_other_node_has_are_missed(tmp_path):
    # Each process has a folder of its own, as nodes have that share no drive.
    result = launch(tmp_path / "log", "--own-folders", processes=2, targets_dir=str(tmp_path / "targets"))
    assert result.status != 0 and not result.what("holds")
    assert "files of targets are not to be seen by process" in result.errors
    assert "name a folder on a drive that all nodes share" in result.errors


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


@pytest.mark.distributed
@pytest.mark.parametrize("last", ["zero", "meta"])
def test_a_process_that_was_given_no_weights_reads_what_the_other_computes(last, tmp_path):
    result = launch(tmp_path / "log", "--last", last, processes=2, environment=FSDP)
    assert result.status == 0, result.errors
    assert result.computed == [(0, 1), (0, 128), (0, 128)]
    assert len(result.what("holds")) == 2 and len(set(result.what("holds"))) == 1


@pytest.mark.distributed
def test_weights_that_zero_3_has_split_are_enough_for_a_store_that_is_complete(saved, tmp_path):
    launcher = (*accelerate("zero3")[1:], "--zero3_init_flag", "true")

    complete = {"precompute_targets": True, "targets_dir": str(tmp_path / "targets")}
    alone = launch(tmp_path / "alone", "--model", saved, **complete)
    assert alone.status == 0, alone.errors
    split = launch(
        tmp_path / "split",
        "--model",
        saved,
        others=[{"precompute_targets": True}, complete],
        launcher=launcher,
        environment=ON_CPU,
    )
    assert split.status == 0, split.errors
    assert split.what("loaded") == ["not all weights"] * 6 and split.what("live") == ["-"] * 2
    assert len(split.what("refused")) == 2
    assert all("one process without DeepSpeed" in what for what in split.what("refused"))
    assert split.what("holds") == alone.what("holds") * 2 and split.computed == []


@pytest.mark.parametrize("method", SWITCHES)
def test_targets_go_by_what_a_row_holds(method, make, tokenizer):
    """A dataset that a trainer has tokenised is shuffled, chosen from or joined, and given to another."""
    sources = ConceptSources([f"{a} is the capital of {b}." for a, b in (("Oslo", "Norway"), ("Rome", "Italy"), ("Riga", "Latvia"))], [["The cat sat."]])  # fmt: skip
    model = tiny("llama", len(tokenizer))
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    rows = make(
        method, model=copy.deepcopy(model), rows=build_erasure_dataset({"capitals": sources}, size=6)
    ).train_dataset
    for others in (
        rows.shuffle(seed=3), rows.select([5, 1]), concatenate_datasets([rows.select([4, 2]), rows.select([0])])
    ):  # fmt: skip
        found = [
            make(method, model=copy.deepcopy(model), rows=others, **{SWITCHES[method]: stored}, max_steps=2)
            .train()
            .training_loss
            for stored in (True, False)
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("method", SWITCHES)
def test_a_training_set_may_be_put_in_another_order_but_not_exchanged(method, make):
    trainer, live = (make(method, **{SWITCHES[method]: stored}) for stored in (True, False))
    batches = []
    for made in (trainer, live):
        made.train_dataset = made.train_dataset.shuffle(seed=1)
        batches.append(next(iter(made.get_train_dataloader())))
    losses = [step(made, batch)[0] for made, batch in zip((trainer, live), batches, strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    other = trainer.train_dataset.map(lambda row: {"forget_ids": [*row["forget_ids"], 5]})
    with pytest.raises(ValueError, match="rows are others than those whose targets were stored"):
        trainer.data_collator([other[0]])


@pytest.mark.parametrize("method", SWITCHES)
def test_predict_makes_the_targets_of_its_own_rows(method, make, dataset):
    sources = ConceptSources(["Lima is the capital of France.", "A longer text about Lima, at length."], [["Bread."]])
    trainer = make(method, **{SWITCHES[method]: True})
    rows = trainer._prepare_dataset(
        build_erasure_dataset({"capitals": sources}, size=10),
        trainer.processing_class,
        trainer.args,
        False,
        None,
        "test",
    )
    evaluated, predicted = trainer.evaluate(rows), trainer.predict(rows).metrics
    assert predicted["test_loss"] == pytest.approx(evaluated["eval_loss"])
