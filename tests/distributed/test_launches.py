"""However a step is spread over processes, it is the same step, and a stopped run ends as one that was not stopped.

One file, so that one worker of pytest-xdist has all tests that read the same launches.
"""

import pytest
import torch

from tests.methods.methods import METHODS

from .conftest import SPREAD
from .launching import KINDS, adapter, launch, losses
from .train import Run


pytestmark = pytest.mark.distributed
SHARDING = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
CASES = [("ddp", name) for name in METHODS] + [(kind, name) for kind in KINDS[1:] for name in SPREAD]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_launches_what_it_names(kind, launched):
    result = launched(kind).results["elm"]
    assert (result["sharding"], result["processes"]) == (SHARDING[kind], 2)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_five_steps_lose_what_one_process_loses(kind, name, single, launched):
    expected, found = single.results[name], launched(kind).results[name]
    assert len(losses(found)) == 5
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)
    for one, other in zip(expected["history"], found["history"], strict=True):
        # The part of an epoch that a step takes shows that the processes did share the rows.
        assert other["epoch"] == one["epoch"]
        for term in (key for key in one if key.endswith("_loss")):
            assert other[term] == pytest.approx(one[term], abs=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], abs=1e-4)


@pytest.mark.parametrize("kind", ["single", *KINDS])
@pytest.mark.parametrize("name", ["accumulated", "checkpointed", "stored"])
def test_accumulation_checkpointing_and_stored_targets_change_no_loss(name, kind, single, launched):
    results = (single if kind == "single" else launched(kind)).results
    assert losses(results[name]) == pytest.approx(losses(single.results["elm"]), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_terms_of_a_batch_are_those_of_data_parallel_training(kind, launched):
    # RepNoise's distance to noise is no mean over texts, so that only equal shares can be compared.
    expected, found = (launched(name) for name in ("ddp", kind))
    assert losses(found.results["repnoise-whole"]) == pytest.approx(
        losses(expected.results["repnoise-whole"]), abs=1e-4
    )
    _compare(found.folder / "repnoise-whole", expected.folder / "repnoise-whole")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_not_run_and_checkpointing_go_together(kind, single, launched):
    assert losses(launched(kind).results["rmu-checkpointed"]) == pytest.approx(losses(single.results["rmu"]), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_model_that_was_never_adapted(kind, launched):
    difference = launched(kind).results["elm"]["difference"]
    assert difference["reference"] < 1e-4 < 0.1 < difference["adapted"]


@pytest.mark.parametrize(("kind", "name"), [*CASES, *((kind, "accumulated") for kind in KINDS)])
def test_the_saved_adapter_is_that_of_one_process(kind, name, single, launched):
    _compare(launched(kind).folder / name, single.folder / name)


@pytest.mark.parametrize("kind", ["single", *KINDS])
def test_every_matrix_of_the_adapter_moves_and_nothing_else_is_saved(kind, single, launched):
    found = single if kind == "single" else launched(kind)
    weights = adapter(found.folder / "elm")
    assert sorted(name.replace(".weight", ".default.weight") for name in weights) == found.results["elm"]["trained"]
    start = found.results["elm"]["start"]
    for name, weight in weights.items():
        assert weight.norm().item() != pytest.approx(start[name.replace(".weight", ".default.weight")], abs=1e-6), name


@pytest.fixture(scope="module")
def in_one(launched, tmp_path_factory):
    """One process goes on from the checkpoints of two."""
    runs = [Run(kind, rows=4, resume=str(launched(kind).folder / "elm" / "checkpoint-3")) for kind in KINDS]
    folder = tmp_path_factory.mktemp("in-one")
    return folder, launch("single", runs, folder)


@pytest.mark.parametrize("kind", ["single", *KINDS])
def test_a_resumed_run_ends_as_the_uninterrupted_one(kind, single, launched):
    found = single if kind == "single" else launched(kind)
    _compare(found.folder / "resumed", found.folder / "elm", atol=1e-5)
    assert losses(found.results["resumed"]) == pytest.approx(losses(found.results["elm"]), abs=1e-5)


def test_two_processes_go_on_from_the_checkpoint_of_one(single, launched):
    found = launched("ddp")
    _compare(found.folder / "from-single", single.folder / "elm", atol=1e-5)
    assert losses(found.results["from-single"]) == pytest.approx(losses(single.results["elm"]), abs=1e-4)


def test_one_process_goes_on_from_the_checkpoint_of_two(in_one, launched):
    folder, results = in_one
    _compare(folder / "ddp", launched("ddp").folder / "elm", atol=1e-5)
    assert losses(results["ddp"])[3:] == pytest.approx(losses(launched("ddp").results["elm"])[3:], abs=1e-4)


def test_shards_of_another_number_of_processes_are_gone_on_from(launched, tmp_path):
    found = launched("fsdp2")
    run = Run("resumed", rows=4, resume=str(found.folder / "elm" / "checkpoint-3"))
    launch("fsdp2", [run], tmp_path, processes=1)
    _compare(tmp_path / "resumed", found.folder / "elm", atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sharding"), [("fsdp2", "FSDP2"), ("zero2", "DeepSpeed ZeRO-2"), ("zero3", "DeepSpeed ZeRO-3")]
)
def test_a_checkpoint_that_the_launch_cannot_read_is_refused(kind, sharding, in_one, launched):
    message = "was written under sharding {!r}, but this run has {!r}, which cannot read its files: launch as before"
    assert message.format(sharding, "none") in in_one[1][kind]["error"]
    assert message.format("none", sharding) in launched(kind).results["from-single"]["error"]


def _compare(folder, other, atol=1e-4) -> None:
    found, expected = adapter(folder), adapter(other)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)
