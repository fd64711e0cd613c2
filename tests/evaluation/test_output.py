import re

import pytest

from elm_trainer.evaluation.evaluate import write_evaluation
from elm_trainer.evaluation.tables import metric_label, verdict_lines
from examples.sweep import plot_pareto

from ..hub.cards import recent_report


PNG = b"\x89PNG"
LOG = [{"step": 1, "erase_loss": 3.0, "retain_loss": 0.5}, {"step": 2, "erase_loss": 2.0}, {"train_runtime": 1.0}]


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    write_evaluation(tmp_path, recent_report())
    return capsys.readouterr().out


def test_the_terminal_shows_the_verdict_before_a_short_table(printed):
    sentences = [" ".join(line) for line in verdict_lines(recent_report())]
    flat = " ".join(printed.split())
    places = [flat.index(sentence) for sentence in sentences]
    assert places == sorted(places) and places[0] == 0 and flat.index("Before and after") > places[-1]
    assert len(printed.splitlines()) < 50


def test_no_word_is_broken_in_80_columns(printed):
    report = recent_report()
    said = [" ".join(line) for line in verdict_lines(report)]
    said += [f"{flag['flag']}: {flag['why']}" for flag in report["flags"]]
    said += [" ".join(metric_label(name, report["roles"])) for name in report["figures"]]
    said.append("Before and after (95 % intervals) measured by before after")
    words = {word for text in said for word in text.split()}
    found = {word for word in printed.split() if not re.fullmatch(r"[─]+|\[?-?[\d.]+[,\]]?", word)}
    assert found and found <= words
    assert max(map(len, printed.splitlines())) <= 80


def test_everything_is_written_from_the_report_alone(report, tmp_path):
    write_evaluation(tmp_path, report | {"training_log": LOG})
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.png", "samples.md"}
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)
    markdown = (tmp_path / "report.md").read_text()
    for name, figure in report["figures"].items():
        [row] = [line for line in markdown.splitlines() if line.startswith(f"| {name} |")]
        assert f"{figure['erased']['value']:.3f}" in row
    assert report["datasets"]["bank capitals"]["sha256"][:12] in markdown
    for state, why in verdict_lines(report):
        assert f"- **{state}** {why}" in markdown
    samples = (tmp_path / "samples.md").read_text()
    assert "What is the capital of Togo?** (true answer: Lomé)" in samples
    assert samples.count("- reference: ") == samples.count("- erased: ") == 3
    assert samples.index("What is the capital of Togo?") < samples.index("## What is to be kept")
    assert samples.index("## What is to be kept") < samples.index("Which river is in Egypt?** (true answer: Nile)")


def test_a_report_without_training_is_drawn_too(report, tmp_path):
    write_evaluation(tmp_path, report)
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)


def test_several_erasures_stand_in_one_picture(report, tmp_path):
    plot_pareto({"one": report, "two": report}, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(PNG)
