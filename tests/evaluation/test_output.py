import io

from rich.console import Console

from elm_trainer.evaluation.output import write_evaluation
from elm_trainer.evaluation.plots.pareto import plot_pareto
from elm_trainer.evaluation.tables import render_table


PNG = b"\x89PNG"
LOG = [{"step": 1, "erase_loss": 3.0, "retain_loss": 0.5}, {"step": 2, "erase_loss": 2.0}, {"train_runtime": 1.0}]


def test_the_table_shows_every_figure_beside_its_reference(report):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_table(report))
    text = console.export_text()
    for name, figure in report["figures"].items():
        assert name in text and f"{figure['erased']['value']:.3f}" in text


def test_everything_is_written_from_the_report_alone(report, tmp_path):
    write_evaluation(tmp_path, report | {"training_log": LOG})
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.png", "samples.md"}
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)
    markdown = (tmp_path / "report.md").read_text()
    for name, figure in report["figures"].items():
        [row] = [line for line in markdown.splitlines() if line.startswith(f"| {name} |")]
        assert f"{figure['erased']['value']:.3f}" in row
    assert report["datasets"]["bank capitals"]["sha256"][:12] in markdown
    samples = (tmp_path / "samples.md").read_text()
    assert "What is the capital of Togo?** (true answer: Lomé)" in samples
    assert samples.count("- reference: ") == samples.count("- erased: ") == 2


def test_a_report_without_training_is_drawn_too(report, tmp_path):
    write_evaluation(tmp_path, report)
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)


def test_several_erasures_stand_in_one_picture(report, tmp_path):
    plot_pareto({"one": report, "two": report}, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(PNG)
