"""What earlier versions wrote is read, and gives what it gave: reports, cards, adapters, checkpoints, targets and caches.

`make.py` says how the files were made. Where a test fails, a format or a key has changed that users have on their disks.
"""

import functools
import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from elm_trainer import (
    compare_reports,
    evaluate_erasure,
    load_erased,
    publish_adapter,
    read_questions,
    read_report,
    synthesize_completions,
)

from . import ingredients as made


LARGEST = 1_500_000


@pytest.fixture(scope="module")
def expected():
    return json.loads(made.EXPECTED.read_text())


@pytest.fixture
def tiny():
    return made.load_tiny()


@pytest.fixture
def erased(tiny):
    model, _ = load_erased(made.PUBLISHED, base_model=tiny[0])
    # Where PEFT looks whether the vocabulary has grown: not on the Hub.
    model.peft_config["default"].base_model_name_or_path = str(made.MODEL)
    return model


def state_of(folder):
    """The files of a folder with their contents and when they were written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def close(value, tolerance=1e-4):
    """The value, its numbers within a tolerance."""
    if isinstance(value, dict):
        return {key: close(part, tolerance) for key, part in value.items()}
    if isinstance(value, list):
        return [close(part, tolerance) for part in value]
    return pytest.approx(value, rel=tolerance, abs=tolerance) if isinstance(value, float) else value


def test_the_files_are_small_and_name_no_machine():
    files = [path for path in made.FILES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST
    for path in files:
        content = path.read_bytes()
        assert not any(home in content for home in (b"/home/", b"/root/", b"/tmp/", b"/Users/")), path


def test_a_report_is_read_and_renders_the_same_text(tmp_path):
    report = read_report(made.REPORTS / "report.json")
    made.write_evaluation(tmp_path, report)
    for name in ("report.md", "samples.md"):
        assert (tmp_path / name).read_text() == (made.REPORTS / name).read_text()


def test_a_report_compares_with_itself_without_a_change():
    report = read_report(made.REPORTS / "report.json")
    compared = compare_reports(report, read_report(made.REPORTS / "report.json"))
    assert compared.keys() == report["items"].keys() & report["figures"].keys()
    for name, figure in compared.items():
        assert figure["first"] == figure["second"] == report["figures"][name]["erased"]


def test_a_report_of_attacks_is_read_and_renders_the_same_text():
    attacks = read_report(made.REPORTS / "attacks.json", "attacks")
    assert made.markdown_attacks(attacks) == (made.REPORTS / "attacks.md").read_text()


def test_a_card_is_read_into_the_same_row_of_the_leaderboard(expected):
    cards, unread = made.find_cards([str(made.PUBLISHED)])
    [entry], skipped = made.read_entries([(made.REPO, text) for _, text in cards])
    assert json.loads(json.dumps(asdict(entry))) == expected["entry"]
    assert unread == skipped == []


@pytest.mark.parametrize("folder", [made.PUBLISHED, made.ADAPTER], ids=["published", "as saved"])
def test_an_adapter_gives_the_same_logits(folder, tiny, expected):
    published = folder == made.PUBLISHED
    model, tokenizer = load_erased(folder, base_model=str(made.MODEL) if published else tiny[0], verify=published)
    torch.testing.assert_close(made.logits(model, tokenizer), expected["logits"], rtol=0, atol=1e-5)


def test_an_adapter_and_its_reports_are_published_as_they_were(tiny, tmp_path, expected):
    publish_adapter(
        made.ADAPTER, made.REPO, report=made.REPORTS / "report.json", attacks=made.REPORTS / "attacks.json",
        model=tiny[0], processing_class=tiny[1], forget=[], questions=read_questions(made.RIVERS), dry_run=True,
        staging_dir=tmp_path / "staged", **made.BASE,
    )  # fmt: skip

    cards, _ = made.find_cards([str(tmp_path / "staged")])
    [entry], _ = made.read_entries([(made.REPO, text) for _, text in cards])
    assert json.loads(json.dumps(asdict(entry))) == expected["entry"]
    report, info = ({}, {})
    for found, name in ((report, "report.json"), (info, "erasure.json")):
        for key, folder in (("before", made.PUBLISHED), ("now", tmp_path / "staged")):
            found[key] = json.loads((folder / name).read_text())
            # More of a recipe may be published than was.
            recipe = found[key].pop("recipe")
            found[f"recipe {key}"] = recipe
        assert found["recipe before"].items() <= found["recipe now"].items()
    assert report["now"] == report["before"]
    files = {key: info[key].pop("files") for key in ("before", "now")}
    assert info["now"] == close(info["before"])
    assert files["now"].keys() == files["before"].keys()
    weights = "adapter_model.safetensors"
    assert files["now"][weights] == files["before"][weights]


def test_training_resumes_from_a_checkpoint_to_the_same_losses(tmp_path, expected):
    shutil.copytree(made.CHECKPOINTS, tmp_path / "run")
    trainer = made.make_trainer("elm", tmp_path / "run", stored=False)
    trainer.train(resume_from_checkpoint=True)
    # The log of the steps before comes with the checkpoint.
    assert [row["step"] for row in made.losses(trainer)] == [1, 2, 3, 4]
    assert made.losses(trainer)[2:] == close(expected["resumed"])


@pytest.mark.parametrize("method", made.METHODS)
def test_stored_targets_are_named_after_what_they_depend_on(method):
    [folder] = (made.TARGETS / method).iterdir()
    key, _ = made.stored_key(folder)
    assert made.name_of(key) == folder.name


@pytest.mark.parametrize("method", made.METHODS)
def test_stored_targets_are_used_and_none_is_computed(method, tmp_path, expected):
    [folder] = (made.TARGETS / method).iterdir()
    # Other builds of torch, such as those for a GPU, would look under another name.
    _, name = made.stored_key(folder)
    shutil.copytree(folder, tmp_path / "targets" / name)
    before = state_of(tmp_path / "targets")

    trainer = made.make_trainer(method, tmp_path / "run", stored=True, targets_dir=str(tmp_path / "targets"))
    trainer.train()

    assert state_of(tmp_path / "targets") == before
    assert made.losses(trainer) == close(expected["stored"][method])


def test_a_cache_of_synthesis_is_used_without_sampling(tiny, tmp_path, expected, monkeypatch):
    shutil.copytree(made.SYNTHESIS, tmp_path / "cache")
    before = state_of(tmp_path / "cache")
    model, tokenizer = tiny
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("It was sampled."))
    result = synthesize_completions(
        model, tokenizer, made.PROMPTS, made.CONCEPT, made.SYNTHESIS_SETTINGS, cache_dir=tmp_path / "cache",
        fingerprint="tiny",
    )  # fmt: skip
    assert json.loads(json.dumps(asdict(result))) == expected["synthesis"]
    assert state_of(tmp_path / "cache") == before


def test_an_interrupted_evaluation_measures_only_what_is_missing(tiny, erased, tmp_path, monkeypatch):
    shutil.copytree(made.JOURNAL, tmp_path / "out")
    ran = []

    def counted(name, measure, setting, side):
        ran.append((name, side))
        return measure(setting, side)

    for name in made.MEASURED:
        monkeypatch.setitem(made.MEASURES, name, functools.partial(counted, name, made.MEASURES[name]))
    report = evaluate_erasure(erased, None, made.suite(), tiny[1], measures=made.MEASURED, output_dir=tmp_path / "out")
    assert ran == [(name, side) for name in made.MEASURED[2:] for side in ("reference", "erased")]
    assert [path.name for path in Path(tmp_path / "out").iterdir() if "partial" in path.name] == []
    whole = read_report(made.REPORTS / "report.json")
    for key in ("reference_sha256", "erased_sha256", "datasets", "roles", "concepts", "samples", "settings"):
        assert report[key] == whole[key], key
    for key in ("figures", "verdict", "flags"):
        assert json.loads(json.dumps(report[key])) == close(whole[key]), key


def test_a_comparison_goes_on_with_the_runs_that_are_kept(tmp_path, expected):
    paths = sorted(made.RUNS.iterdir())
    assert [path.stem.rpartition("-")[0] for path in paths] == [
        "final-graddiff-seed0",
        "reference-dev",
        "reference-test",
    ]
    kept = made.Runs(tmp_path / "runs")
    for path in paths:
        stored, name = json.loads(path.read_text()), path.stem.rpartition("-")[0]
        found = made.Runs(made.RUNS, only_read=True).once(name, stored["depends"], pytest.fail)
        assert found == stored["result"]
        # What was run with other versions of the libraries is run again, and so has another name.
        here = stored["depends"] | {"versions": {name: version(name) for name in stored["depends"]["versions"]}}
        new = kept.path(name, here).with_suffix(".json")
        new.parent.mkdir(exist_ok=True)
        if here == stored["depends"]:
            assert new.name == path.name
        new.write_text(json.dumps({"depends": here, "result": found}))

    config, runs = made.comparison(tmp_path), made.Runs(tmp_path / "runs", only_read=True)
    with made.few_questions():
        run = made.MethodRun(config, "graddiff", runs, made.measure_reference(config, runs))
        assert json.loads(json.dumps(run.run())) == expected["comparison"]
