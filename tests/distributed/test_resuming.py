"""A run goes on where it was stopped, under the same launch and, where the libraries can, under another."""

import pytest
import torch

from .launching import KINDS, adapter, launch, losses
from .train import Run


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def in_one(launched, tmp_path_factory):
    """One process goes on from the checkpoints of two."""
    runs = [Run(kind, rows=4, resume=str(launched(kind).folder / "elm" / "checkpoint-3")) for kind in KINDS]
    folder = tmp_path_factory.mktemp("in-one")
    return folder, launch("single", runs, folder)


def same(folder, other) -> None:
    found, expected = adapter(folder), adapter(other)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["single", *KINDS])
def test_a_resumed_run_ends_as_the_uninterrupted_one(kind, single, launched):
    found = single if kind == "single" else launched(kind)
    same(found.folder / "resumed", found.folder / "elm")
    assert losses(found.results["resumed"]) == pytest.approx(losses(found.results["elm"]), abs=1e-5)


def test_two_processes_go_on_from_the_checkpoint_of_one(single, launched):
    found = launched("ddp")
    same(found.folder / "from-single", single.folder / "elm")
    assert losses(found.results["from-single"]) == pytest.approx(losses(single.results["elm"]), abs=1e-4)


def test_one_process_goes_on_from_the_checkpoint_of_two(in_one, launched):
    folder, results = in_one
    same(folder / "ddp", launched("ddp").folder / "elm")
    assert losses(results["ddp"])[3:] == pytest.approx(losses(launched("ddp").results["elm"])[3:], abs=1e-4)


def test_shards_of_another_number_of_processes_are_gone_on_from(launched, tmp_path):
    found = launched("fsdp2")
    run = Run("resumed", rows=4, resume=str(found.folder / "elm" / "checkpoint-3"))
    launch("fsdp2", [run], tmp_path, processes=1)
    same(tmp_path / "resumed", found.folder / "elm")


@pytest.mark.parametrize(
    ("kind", "sharding"), [("fsdp2", "FSDP2"), ("zero2", "DeepSpeed ZeRO-2"), ("zero3", "DeepSpeed ZeRO-3")]
)
def test_a_checkpoint_that_the_launch_cannot_read_is_refused(kind, sharding, in_one, launched):
    message = "was written under sharding {!r}, but this run has {!r}, which cannot read its files: launch as before"
    assert message.format(sharding, "none") in in_one[1][kind]["error"]
    assert message.format("none", sharding) in launched(kind).results["from-single"]["error"]
