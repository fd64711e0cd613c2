"""A checkpoint from which a byte is gone is not gone on from, and says which file."""

import errno
import json
import os
import resource
import shutil
import signal
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from elm_trainer import ConceptSources, ElmConfig, ElmTrainer, build_erasure_dataset
from elm_trainer.files import UNFINISHED
from elm_trainer.methods.checkpointing import (
    FINISHED_FILE,
    Launch,
    check_whole,
    checkpoints,
    damage,
    last_whole,
    mark_finished,
    read_mark,
    restore_set_aside,
    rotate,
)
from elm_trainer.run_lock import FolderInUseError
from tests.fuzz import fuzz
from tests.test_run_lock import start

from .methods import tiny, trained


STEPS = 4
FILES = (
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
    "tokenizer_config.json", "trainer_state.json", "training_args.bin", FINISHED_FILE,
)  # fmt: skip


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "cut by a byte": lambda content: content[:-1],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a flipped bit": lambda content: flip(content, len(content) * 3 // 4),
    "no text": lambda content: b"\xff" + content,
    "missing": None,
}


def make(output, tokenizer, name=None, **options):
    dataset = build_erasure_dataset(
        {"capitals": ConceptSources(["Oslo is the capital of Norway.", "Rome is the capital."], [["Bread is good."]])},
        size=8,
    )
    args = ElmConfig(
        str(output),
        **dict(
            max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, bf16=False, gradient_checkpointing=False,
            logging_steps=1, save_strategy="steps", save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
            precompute_targets=False,
        )
        | options,
    )  # fmt: skip
    model, lora = tiny("llama", len(tokenizer)), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    if name is not None:
        model, lora = get_peft_model(model, lora, adapter_name=name), None
    return ElmTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """A run of four steps with a checkpoint after the second and the last, and what it has trained."""
    output = tmp_path_factory.mktemp("whole") / "run"
    trainer = make(output, tokenizer)
    trainer.train()
    return output, trained(trainer.model)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that run."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


def spoil(path, how):
    content = path.read_bytes()
    path.unlink() if DAMAGES[how] is None else path.write_bytes(DAMAGES[how](content))


# Without its last line break, the mark says the same.
@pytest.mark.parametrize(
    ("name", "how"), [pair for pair in product(FILES, DAMAGES) if pair != (FINISHED_FILE, "cut by a byte")]
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_taken(name, how, run, caplog):
    spoil(run / "checkpoint-4" / name, how)
    assert last_whole(checkpoints(run)) == run / "checkpoint-2"
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is .*checkpoint-4'") as raised:
        check_whole(run / "checkpoint-4")
    assert name in str(raised.value) and "resume_from_checkpoint=True" in str(raised.value)


def as_before(checkpoint):
    """A checkpoint as earlier versions wrote it."""
    mark = json.loads((checkpoint / FINISHED_FILE).read_text())
    old = {field.name: mark[field.name] for field in fields(Launch)}
    (checkpoint / FINISHED_FILE).write_text(json.dumps(old, indent=2))


@pytest.mark.parametrize("how", ["cut", "empty", "zeros", "missing"])
@pytest.mark.parametrize("name", [name for name in FILES if name not in ("tokenizer_config.json", FINISHED_FILE)])
def test_damage_is_seen_as_far_as_it_can_be_in_checkpoints_of_before(name, how, run):
    for checkpoint in checkpoints(run):
        as_before(checkpoint)
    assert damage(run / "checkpoint-4") is None
    spoil(run / "checkpoint-4" / name, how)
    found = damage(run / "checkpoint-4")
    needed = how != "missing" or name not in ("adapter_config.json", "training_args.bin")
    assert (found is not None) is needed and (not needed or name in found)


def test_a_folder_in_place_of_a_file_and_a_mark_of_another_kind_are_damage(run):
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    (run / "checkpoint-4" / "optimizer.pt").mkdir()
    assert "optimizer.pt" in damage(run / "checkpoint-4")
    for mark in ("[" * 100_000, "[]", "null", '{"sharding": "none"}', "{}", '{"files": {}, "sha256": ""}'):
        (run / "checkpoint-4" / FINISHED_FILE).write_text(mark)
        assert FINISHED_FILE in damage(run / "checkpoint-4")


@fuzz(40)
@given(data=st.data())
def test_no_flipped_bit_of_any_file_is_overlooked(data, whole):
    checkpoint = whole[0] / "checkpoint-4"
    marked = (checkpoint / FINISHED_FILE).read_bytes()
    path = data.draw(st.sampled_from(sorted(path for path in checkpoint.iterdir() if path.is_file())))
    content = path.read_bytes()
    # Some near the ends, where the formats keep what they say of themselves.
    last = len(content) - 1
    place = data.draw(st.integers(0, last) | st.integers(0, min(200, last)) | st.integers(max(last - 200, 0), last))
    path.write_bytes(
        content[:place] + bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))]) + content[place + 1 :]
    )
    try:
        # A line break at the end becomes another blank.
        assert damage(checkpoint) is not None or (path.name, place) == (FINISHED_FILE, last)
        if path.name != FINISHED_FILE:
            as_before(checkpoint)
            damage(checkpoint)
    finally:
        (checkpoint / FINISHED_FILE).write_bytes(marked)
        path.write_bytes(content)


def resumes(output, tokenizer, expected, **options):
    again = make(output, tokenizer, **options)
    again.train(resume_from_checkpoint=True)
    for name, weight in trained(again.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    assert damage(output / "checkpoint-4") is None
    assert not [path for path in output.rglob("*") if UNFINISHED in path.name or path.name.endswith(".former")]
    return again


def test_a_run_goes_back_behind_a_damaged_checkpoint_to_the_same_result(whole, run, tokenizer):
    spoil(run / "checkpoint-4" / "optimizer.pt", "a flipped bit")
    again = resumes(run, tokenizer, whole[1], save_total_limit=1)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4"]
    assert again.args.save_total_limit == 1


def test_a_run_with_a_named_adapter_goes_on_and_sees_damage_in_its_folder(tokenizer, tmp_path):
    first = make(tmp_path, tokenizer, "mine")
    first.train()
    weights = tmp_path / "checkpoint-2" / "mine" / "adapter_model.safetensors"
    content = weights.read_bytes()
    spoil(weights, "a flipped bit")
    assert "mine/adapter_model.safetensors" in damage(tmp_path / "checkpoint-2")
    weights.write_bytes(content)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumes(tmp_path, tokenizer, trained(first.model), name="mine")


def test_a_run_goes_on_from_a_checkpoint_of_before(whole, run, tokenizer):
    shutil.rmtree(run / "checkpoint-4")
    as_before(run / "checkpoint-2")
    resumes(run, tokenizer, whole[1])


def test_where_no_checkpoint_is_whole_nothing_is_begun_and_nothing_deleted(run, tokenizer):
    for checkpoint in checkpoints(run):
        spoil(checkpoint / "rng_state.pth", "missing")
    before = sorted(run.rglob("*"))
    with pytest.raises(
        ValueError, match=r"every finished .*checkpoint-4: rng_state.pth is missing; .*another `output"
    ):
        make(run, tokenizer).train(resume_from_checkpoint=True)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_damaged_settings_of_the_run_are_named(content, run, tokenizer, request):
    (run / "erasure_run.json").write_bytes(content)
    trainer = request.getfixturevalue("trainer_of")(run)
    with pytest.raises(ValueError, match=r"erasure_run.json, which holds the settings .* cannot be read .*delete it"):
        trainer.train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def trainer_of(tokenizer, tmp_path_factory):
    """One trainer for all tests in which it is refused to train, in a folder of choice."""
    trainer = make(tmp_path_factory.mktemp("refused"), tokenizer)

    def place(output):
        trainer.args.output_dir = str(output)
        return trainer

    return place


def test_a_checkpoint_without_the_optimizer_is_not_gone_on_from(run, trainer_of):
    for checkpoint in checkpoints(run):
        # As `save_only_model` leaves it.
        (checkpoint / "optimizer.pt").unlink()
        mark_finished(checkpoint, Launch("none", 1, 2))
    with pytest.raises(ValueError, match="optimizer.pt is missing"):
        trainer_of(run).train(resume_from_checkpoint=True)


def test_a_second_run_in_the_folder_is_refused_before_it_changes_anything(run, trainer_of):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    process, pid = start(run)
    try:
        with pytest.raises(FolderInUseError, match=f"another run is writing .process {pid} on"):
            trainer_of(run).train(resume_from_checkpoint=True)
    finally:
        process.kill()
        process.join()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_that_cannot_be_written_to_is_named_before_training(tmp_path, trainer_of):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="`output_dir` is .*file/run', which cannot be written to"):
        trainer_of(tmp_path / "file" / "run").train()


def finished(folder, *steps):
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        mark_finished(folder / f"checkpoint-{step}", Launch("none", 1, 2))


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(1, None, [6, 10]), (2, None, [4, 6, 10]), (1, 2, [2, 6, 10]), (None, None, [2, 4, 6, 10])],
)
def test_the_oldest_by_step_go_whatever_the_clock_says(limit, best, left, tmp_path):
    finished(tmp_path, 2, 4, 6, 10)
    for age, step in enumerate((6, 10, 4, 2)):
        os.utime(tmp_path / f"checkpoint-{step}", (age * 3600, age * 3600))
    rotate(tmp_path / "checkpoint-6", limit, best and tmp_path / f"checkpoint-{best}")
    assert [int(path.name.split("-")[1]) for path in checkpoints(tmp_path)] == left


def test_unfinished_ones_go_before_finished_ones(tmp_path):
    finished(tmp_path, 2, 4, 6)
    (tmp_path / "checkpoint-4" / FINISHED_FILE).unlink()
    rotate(tmp_path / "checkpoint-6", 2, None)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6"]


@pytest.mark.parametrize("is_finished", [False, True])
def test_an_earlier_checkpoint_of_the_step_stays_until_the_new_one_is_finished(is_finished, tmp_path):
    finished(tmp_path, 4)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-4.former")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "new").write_text("")
    if is_finished:
        mark_finished(tmp_path / "checkpoint-4", Launch("none", 1, 2))
    restore_set_aside(tmp_path)
    assert damage(tmp_path / "checkpoint-4") != FINISHED_FILE
    assert (tmp_path / "checkpoint-4" / "new").exists() is is_finished
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_the_mark_is_on_the_disk_after_all_it_stands_for(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "a").write_text("a")
    calls, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (calls.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    mark_finished(tmp_path / "checkpoint-2", Launch("none", 1, 2))
    assert [Path(call).name[:12] for call in calls] == [
        "a",
        "checkpoint-2",
        ".elm-tmp-era",
        "checkpoint-2",
        tmp_path.name[:12],
    ]
    launch, files = read_mark(tmp_path / "checkpoint-2")
    assert asdict(launch)["processes"] == 1 and files["a"]["bytes"] == 1


class DiskFull:
    """No file may grow beyond a size, as on a drive with little space left."""

    def __init__(self, size):
        self._size = size

    def __enter__(self):
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


@pytest.mark.parametrize("size", [64, 3_000, 30_000, 60_000])
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(size, whole, run, tokenizer):
    spoil(run / "checkpoint-4" / "scheduler.pt", "cut")
    trainer = make(run, tokenizer)
    with DiskFull(size), pytest.raises(OSError, match="could not be written .*free some space") as raised:
        trainer.train(resume_from_checkpoint=True)
    assert "File too large" in str(raised.value) or raised.value.errno in (errno.EFBIG, None)
    assert damage(run / "checkpoint-2") is None
    assert not [path for path in run.rglob("*") if UNFINISHED in path.name]


def test_a_model_saved_over_another_on_a_full_disk_leaves_the_other(whole, tokenizer, tmp_path):
    trainer = make(tmp_path / "run", tokenizer)
    trainer.save_model(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    for size in (64, 3_000, 20_000):
        with DiskFull(size), pytest.raises(OSError, match="could not be saved to .*adapter'.*free some space"):
            trainer.save_model(str(tmp_path / "adapter"))
        assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    trainer.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    for _ in range(2):
        trainer.save_model(str(tmp_path / "adapter"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {*before, "other"}
    assert (tmp_path / "adapter" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("when", ["model", "optimizer", "state", "mark", "rotation"])
def test_a_run_that_is_killed_while_it_saves_goes_on_to_the_same_result(when, whole, run, tokenizer, monkeypatch):
    spoil(run / "checkpoint-4" / "adapter_model.safetensors", "a flipped bit")
    trainer = make(run, tokenizer, save_total_limit=1)

    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    where = {
        "model": (trainer.processing_class, "save_pretrained"),
        "optimizer": (trainer, "_save_optimizer_and_scheduler"),
        "state": (trainer, "_save_rng_state"),
        "mark": ("elm_trainer.methods.checkpointing.write_json",),
        "rotation": ("elm_trainer.methods.checkpointing.rotate",),
    }
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(*where[when], kill)
        try:
            trainer.train(resume_from_checkpoint=True)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert damage(run / "checkpoint-2") is None

    resumes(run, tokenizer, whole[1], save_total_limit=1)
