import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elm_trainer.distributed import from_first, processes_and_rank
from elm_trainer.evaluation.fluency import generate_answers
from elm_trainer.evaluation.pair import in_shards, run_batches
from tests.distributed.launching import ON_CPU, accelerate
from tests.processes import run


ROOT = Path(__file__).parents[2]
MEASURED = ("figures", "items", "samples", "verdict", "flags", "shortcuts", "datasets", "harness")


def test_one_process_runs_every_batch_in_order(tiny_model):
    assert processes_and_rank() == (1, 0)
    assert from_first("mine") == "mine"
    assert run_batches(lambda batch: batch * 2, [3, 1, 2], tiny_model, over_ranks=True) == [6, 2, 4]
    assert run_batches(lambda batch: batch, [], tiny_model) == []
    assert not in_shards(tiny_model)


def test_sampled_answers_without_a_seed_cannot_be_shared(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="`seed` is None.*give one"):
        generate_answers(tiny_model, tokenizer, ["Oslo"], temperature=1.0, over_ranks=True)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Gives what each process of a kind of launch found."""
    known = {}

    def get(kind):
        if kind not in known:
            known[kind] = launch(kind, tmp_path_factory.mktemp(kind))
        return known[kind]

    return get


def launch(kind, output):
    program = ["-m", "tests.evaluation.run_evaluation", str(output)]
    if kind == "single":
        result = run([sys.executable, *program])
    else:
        command = [*accelerate(kind), *program]
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | ON_CPU, capture_output=True, text=True, timeout=500
        )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert sorted(path.name for path in (output / "report").iterdir()) == ["report.json"]
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(1 if kind == "single" else 2)]


def measured(found):
    return {key: found["report"][key] for key in MEASURED}


@pytest.mark.distributed
def test_every_process_gets_all_results_however_the_launch_began(tmp_path):
    script = tmp_path / "share.py"
    script.write_text(
        "import json, sys, torch\n"
        "from elm_trainer.distributed import from_first, processes_and_rank\n"
        "from elm_trainer.evaluation.pair import run_batches\n"
        "torch.distributed.init_process_group('gloo')\n"
        "ranks, rank = processes_and_rank()\n"
        "found = run_batches(lambda batch: [batch, rank], ['a', 'b', 'c'], over_ranks=True)\n"
        "none = run_batches(lambda batch: batch, [], over_ranks=True)\n"
        "json.dump([ranks, found, none, from_first(rank)], open(f'{sys.argv[1]}/{rank}', 'w'))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    run([sys.executable, script, tmp_path], processes=2, check=True)

    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == [2, [["a", 0], ["b", 1], ["c", 0]], [], 0]


@pytest.mark.distributed
def test_two_processes_share_the_work_and_both_report_what_one_does(evaluated):
    [alone], both = evaluated("single"), evaluated("ddp")

    for found in both:
        assert measured(found) == measured(alone)
        assert found["report"]["erased_sha256"] == alone["report"]["erased_sha256"]
        assert found["forwards"] < 0.7 * alone["forwards"]
    assert sum(found["forwards"] for found in both) == alone["forwards"]
    assert both[0]["report"]["seconds"].keys() == alone["report"]["seconds"].keys()
    assert {"benchmarks erased", "harness erased"} < alone["report"]["seconds"].keys()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_weights_in_shards_are_run_in_step_and_measure_as_whole_ones(evaluated, kind):
    [alone], both = evaluated("single"), evaluated(kind)

    for found in both:
        assert found["forwards"] == alone["forwards"]
        for key in ("reference_sha256", "erased_sha256"):
            assert found["report"][key] == alone["report"][key]
        for name, figure in alone["report"]["figures"].items():
            for side in ("reference", "erased", "change"):
                assert found["report"]["figures"][name][side] == pytest.approx(figure[side], rel=1e-4, abs=1e-6), name
        assert found["report"]["samples"] == alone["report"]["samples"]
        assert "shards" in found["refused"] and "leave it out" in found["refused"]
    assert measured(both[0]) == measured(both[1])


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_the_callback_logs_the_same_figures_under_every_launch(evaluated, kind):
    [alone], both = evaluated("single"), evaluated(kind)

    def figures(found):
        return [{key: value for key, value in entry.items() if key.startswith("dev_")} for entry in found["logged"]]

    assert len(figures(alone)) == 1
    assert figures(both[0]) == figures(both[1]) == figures(alone)
