import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from elm_trainer.comparison.config import Bench, suite_of
from elm_trainer.comparison.report import make_report
from elm_trainer.comparison.run import MethodRun, seconds_of
from elm_trainer.comparison.tables import markdown_comparison, plot_comparison, table_rows
from elm_trainer.files import MissingRunError, Runs


def files(config):
    return {path.name: path.stat().st_mtime_ns for path in Path(config.output_dir, "runs").glob("*.json")}


@pytest.fixture
def trainings(monkeypatch):
    """Names of the runs that are really done, in order."""
    names = []
    for name in ("_search_one", "_final_one"):
        real = getattr(MethodRun, name)

        def counted(self, *args, name=name, real=real):
            names.append((name.split("_")[1], self.method, *args))
            return real(self, *args)

        monkeypatch.setattr(MethodRun, name, counted)
    return names


def test_dev_and_test_share_no_question_prompt_or_text(tiny):
    config = tiny(questions=120, dev_questions=120, prompts=40)
    dev, test = (suite_of(config, split) for split in ("dev", "test"))
    # Some ways of asking are kept for the test split.
    assert dev.banks.keys() < test.banks.keys()
    for name in dev.banks:
        asked = [{question.text for question in suite.banks[name]} for suite in (dev, test)]
        assert asked[0] and asked[1] and not asked[0] & asked[1], name
    for field in ("concept_prompts", "retain_texts"):
        read = [set(getattr(suite, field)) for suite in (dev, test)]
        assert read[0] and read[1] and not read[0] & read[1], field


def test_a_concept_of_ones_own_is_compared_by_its_own_bank(one_setting, reference_of, method_run, tmp_path):
    (tmp_path / "texts.txt").write_text("Brannock dyes its wool with madder.\n")
    towns = [f"Town {chr(65 + number)}" for number in range(20)]
    records = [
        {"question": f"What dyes {t}?", "answer": "madder", "distractors": ["oak", "rye"], "subject": t} for t in towns
    ]
    (tmp_path / "bank.yaml").write_text(yaml.safe_dump({"questions": records}))
    (tmp_path / "ladder.yaml").write_text("- {attack: scaling, factors: [0.5]}\n")
    own = {"concept": "dyes", "forget": str(tmp_path / "texts.txt"), "bank": str(tmp_path / "bank.yaml")}
    config = one_setting(**own, seeds=[0], dataset_size=9, ladder=str(tmp_path / "ladder.yaml"), synthetic=None)

    asked = [{q.subject for q in suite_of(config, split).banks["dyes"]} for split in ("dev", "test")]
    assert asked[0] and asked[1] and not asked[0] & asked[1]
    assert Bench(config, reference_of(config).processing_class).dataset(0).unique("forget") == [
        "Brannock dyes its wool with madder."
    ]
    result = method_run(config, "graddiff").run()
    report = make_report(config, reference_of(config), {"graddiff": result}, None)
    assert report["tables"]["updates"]["methods"]["graddiff"]["figures"]["multiple_choice.dyes.pmi"]
    assert report["attacks"]["graddiff"]["figures"]["none.pmi"]["erased"]["n"] == len(config.own_questions("test"))


def test_the_search_reads_the_dev_split_only(tiny, method_run):
    run = method_run(tiny(), "graddiff")
    whole = run._reference
    # Whatever the search would read of the test split is not there.
    run._reference = replace(
        whole, **{name: {"dev": getattr(whole, name)["dev"]} for name in ("suites", "items", "identity")}
    )
    entries = run.search()
    assert all(entry["score"]["worst"] == max(entry["score"].values()) for entry in entries)
    with pytest.raises(KeyError, match="test"):
        run.final(0, 0)


def test_a_stopped_run_goes_on_with_what_is_not_finished_and_then_is_only_read(
    tiny, method_run, trainings, monkeypatch
):
    class Stopped(BaseException):
        pass

    config = tiny()
    real = MethodRun._final_one

    def stop(self, index, seed):
        if seed == 1:
            raise Stopped
        return real(self, index, seed)

    with monkeypatch.context() as patched:
        patched.setattr(MethodRun, "_final_one", stop)
        with pytest.raises(Stopped):
            method_run(config, "graddiff").run()
    finished = files(config)
    assert sorted(name.rpartition("-")[0] for name in finished if "graddiff" in name) == [
        "final-graddiff-seed0", "search-graddiff-0", "search-graddiff-1"
    ]  # fmt: skip
    done = len(trainings)
    result = method_run(config, "graddiff").run()
    assert [entry[0] for entry in trainings[done:]] == ["final"] and trainings[-1][-1] == 1
    assert list(result["finals"]) == ["0", "1"]
    assert {name: files(config)[name] for name in finished} == finished

    trainings.clear()
    reader = method_run(config, "graddiff")
    reader._runs = Runs(config.output_dir + "/runs", only_read=True)
    assert reader.run() == result and trainings == []


def test_a_changed_recipe_reuses_nothing(one_setting, method_run):
    config = one_setting(seeds=[0])
    method_run(config, "graddiff").run()
    shorter = {"per_device_train_batch_size": 4, "max_length": 24}
    for changed in ({"updates": 1}, {"lora_rank": 3}, {"training": shorter}):
        other = method_run(replace(config, **changed), "graddiff")
        other._runs = Runs(config.output_dir + "/runs", only_read=True)
        with pytest.raises(MissingRunError):
            other.run()


def test_another_methods_settings_and_more_seeds_reuse_what_is_finished(one_setting, method_run, trainings):
    config = one_setting(seeds=[0])
    method_run(config, "graddiff").run()
    trainings.clear()
    more = replace(config, seeds=[0, 1], methods=config.methods | {"elm": {"grid": [{"learning_rate": 1e-3}]}})
    method_run(more, "graddiff").run()
    assert trainings == [("final", "graddiff", 0, 1)]


def test_of_all_runs_the_first_keeps_its_adapter_and_tells_its_memory(one_setting, method_run):
    config = one_setting()
    result = method_run(config, "graddiff").run()
    kept = [path for path in Path(config.output_dir, "runs").iterdir() if path.is_dir()]
    assert [path.name.rpartition("-")[0] for path in kept] == ["final-graddiff-seed0"]
    assert (kept[0] / "adapter_model.safetensors").exists()
    first, second = (final["peak_memory_bytes"] for final in result["finals"].values())
    assert first > 100e6 and second is None


def test_a_method_that_fails_is_reported_as_failed(one_setting, method_run, reference_of, tmp_path):
    config = one_setting(
        methods={
            "elm": {"grid": [{"learning_rate": 1e-2}]},
            "graddiff": {"grid": [{"learning_rate": 1e30, "warmup_steps": 0}]},
        }
    )
    results = {"elm": method_run(config, "elm").run()}
    seconds = seconds_of(results["elm"])
    results["graddiff"] = method_run(config, "graddiff", seconds).run()
    report = make_report(config, reference_of(config), results, seconds)
    assert set(report["tables"]["updates"]["methods"]["graddiff"]["failed"]) == {"0", "1"}
    for budget in ("updates", "seconds"):
        row = table_rows(report, budget)[-1]
        assert row[0] == "GradDiff (failed: seed 0, seed 1)" and set(row[1:]) == {"–"}
    text = markdown_comparison(report)
    assert "GradDiff failed, seed 1: " in text
    plot_comparison(report, tmp_path / "pareto.png")
    json.dumps(report, allow_nan=False)


def test_settings_that_all_fail_leave_no_final_run(tiny, method_run, reference_of):
    grid = [{"learning_rate": 1e30, "warmup_steps": 0}, {"learning_rate": 1e31, "warmup_steps": 0}]
    config = tiny(methods={"elm": {"grid": grid}})
    result = method_run(config, "elm").run()
    assert result["chosen"] is None and result["finals"] == {} and seconds_of(result) is None
    report = make_report(config, reference_of(config), {"elm": result}, None)
    text = markdown_comparison(report)
    assert "ELM failed, search: " in text and "not measured, since ELM, whose time it is, failed" in text


def test_without_a_time_budget_that_table_has_no_figures(one_setting, method_run, reference_of):
    config = one_setting(
        seeds=[0],
        methods={
            "elm": {"grid": [{"learning_rate": 1e30, "warmup_steps": 0}]},
            "graddiff": {"grid": [{"learning_rate": 1e-2}]},
        },
    )
    results = {method: method_run(config, method).run() for method in config.methods}
    report = make_report(config, reference_of(config), results, seconds_of(results["elm"]))
    assert report["tables"]["updates"]["methods"]["graddiff"]["figures"]
    assert not report["tables"]["seconds"]["methods"]["graddiff"]["figures"]


def test_a_budget_that_setup_uses_up_counts_as_the_reference(one_setting, method_run, reference_of):
    config = one_setting(seeds=[0])
    results = {"elm": method_run(config, "elm").run(), "graddiff": method_run(config, "graddiff", 1e-3).run()}
    report = make_report(config, reference_of(config), results, 1e-3)
    row = report["tables"]["seconds"]["methods"]["graddiff"]
    assert row["updates"] == [0]
    assert all(figure["erased"]["value"] == figure["reference"]["value"] for figure in row["figures"].values())
    assert "GradDiff: no update ended within the 0 s" in markdown_comparison(report)
