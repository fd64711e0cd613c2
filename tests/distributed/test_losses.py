"""However a step is spread over processes, it is the same step."""

import pytest
import torch

from tests.methods.methods import METHODS

from .conftest import SPREAD
from .launching import KINDS, adapter, losses


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


def _compare(folder, other) -> None:
    found, expected = adapter(folder), adapter(other)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)
