"""No text of a picture is cut off, and none lies upon another."""

from itertools import combinations
from math import exp

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks.report import Figure as Ratio
from benchmarks.report import draw
from elm_trainer.attacks.report import plot_attacks
from elm_trainer.comparison.tables import plot_comparison
from elm_trainer.evaluation.inside import plot_inside
from elm_trainer.evaluation.tables import plot_report
from elm_trainer.gold_standard import COLORS, plot_gold_standard
from examples.sweep import plot_pareto

from ..hub.cards import recent_report


METHODS = ("ELM", "RMU", "WHP", "RepNoise", "GradDiff", "NPO", "SimNPO")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws into a file, and gives the figure that was written there."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )

    def draw_one(plot, report):
        path = tmp_path / "picture.png"
        plot(report, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        return saved.pop()

    return draw_one


def texts_of(figure):
    """What stands in a picture and where, in pixels; ticks beyond the ends of their axis are not drawn."""
    hidden = set()
    for axes in figure.findobj(lambda artist: hasattr(artist, "xaxis")):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not axes.axison or not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    shown = [
        text for text in figure.findobj(Text) if text not in hidden and text.get_visible() and text.get_text().strip()
    ]
    return {text: text.get_window_extent() for text in shown}


def faults(figure):
    """The texts that are cut off and the pairs that overlap by more than a pixel."""
    boxes = texts_of(figure)
    picture = figure.bbox
    found = [
        text.get_text()
        for text, box in boxes.items()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > picture.x1 + 1 or box.y1 > picture.y1 + 1
    ]
    for (first, one), (second, other) in combinations(boxes.items(), 2):
        apart = one.x1 - 1 < other.x0 or other.x1 - 1 < one.x0 or one.y1 - 1 < other.y0 or other.y1 - 1 < one.y0
        if not apart:
            found.append(f"{first.get_text()} | {second.get_text()}")
    return found


def interval(value, width=0.05):
    return {"value": value, "low": value - width, "high": value + width, "n": 60}


def evaluation():
    log = [
        {"step": step, "erase_loss": exp(2 - step / 40), "retain_loss": 0.1, "consistency_loss": 2.0}
        for step in range(99)
    ]
    return recent_report() | {"training_log": log}


def trade_off():
    """Five settings, the last three with the same figures."""
    return {f"consistency_weight {weight}": recent_report() for weight in (0, 0.5, 1, 3, 10)}


def attacks():
    report = recent_report()["attacks"]
    names = [
        name for name, figure in report["figures"].items() if name.startswith("relearning") and name.endswith(".pmi")
    ]
    points = [[step, 0.5, 0.4, 0.6] for step in (0, 5, 10, 20)]
    return report | {"curves": dict.fromkeys(names, points)}


def inside():
    curve = [interval(0.5 + layer / 100) for layer in range(31)]
    probe = {"accuracy": curve, "control": curve}
    weights = [{"layer": layer, "effective_rank": 4.0} for layer in range(30)]
    return {
        "probe": {"reference": probe, "erased": probe},
        "logit_lens": {"chance": 0.25, "reference": {"accuracy": curve}, "erased": {"accuracy": curve}},
        "norms": {"forget": {"ratio": curve}, "retain": {"ratio": curve}},
        "effect_rank": {"hidden": {"tokens": 999, "effective_rank": [float(layer) for layer in range(31)]}, "weights": weights},
    }  # fmt: skip


def comparison():
    """All methods close to one another, where names beside the points would lie upon each other."""
    rows = {}
    for index, name in enumerate(METHODS):
        changes = {
            "multiple_choice.capitals.pmi": interval(-0.1 - index / 200),
            "specificity.near": interval(-0.01 * index),
            "specificity.far": interval(-0.02),
            "fluency.greedy.r_ppl": interval(1.5 + index / 50),
            "retention.perplexity": interval(1.2),
        }
        rows[name.lower()] = {"figures": {key: {"change": change} for key, change in changes.items()}}
    methods = {name.lower(): {"label": name} for name in METHODS}
    return {
        "concept": "capitals",
        "methods": methods,
        "tables": {budget: {"methods": rows} for budget in ("updates", "seconds")},
    }


def gold_standard():
    names = [
        *(f"accuracy.{kind}" for kind in ("keepers", "harvests", "captains", "crafts", "retained")),
        "open_answers.concept", "open_answers.retained", "r_ppl.taught", "r_ppl.never-taught",
        "perplexity.prose", "perplexity.retained_answers",
    ]  # fmt: skip
    split = {
        "goal": 0.6,
        "models": {name: {"ratio": {"value": 10.0**place, "low": 0.8 * 10**place, "high": 1.2 * 10**place}} for place, name in enumerate(COLORS)},
    }  # fmt: skip
    points = [[step, 0.5, 0.4, 0.6] for step in (0, 25, 200)]
    return {
        "chance": 0.25,
        "figures": {name: {model: interval(0.9, 0.2) for model in COLORS} for name in names},
        "curves": {name: dict.fromkeys(COLORS, points) for name in ("all", "half")},
        "relearning": {"all": split, "half": split},
        "ordering": list(COLORS),
    }


def benchmark():
    meanings = {
        "time_vs_best_sft": "seconds per sample, ELM / the fastest fine-tuning found",
        "memory_vs_sft_batch4": "peak memory of the whole process in a step, ELM / fine-tuning of four samples at a time",
        "released_time_vs_ours": "seconds per sample, released loop / ELM",
    }
    return {key: Ratio(meaning, [0.9, 1.0, 1.1], at_most=1.05).record() for key, meaning in meanings.items()}


@pytest.mark.parametrize(
    ("plot", "made"),
    [
        (plot_report, evaluation),
        (plot_pareto, trade_off),
        (plot_attacks, attacks),
        (plot_inside, inside),
        (plot_comparison, comparison),
        (plot_gold_standard, gold_standard),
        (draw, benchmark),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_text_of_a_picture_is_cut_off_or_overlaps(plot, made, drawn):
    figure = drawn(plot, made())
    assert len(texts_of(figure)) >= 8
    assert faults(figure) == []


def test_a_text_that_is_cut_off_or_overlaps_is_found(drawn):
    def spoiled(_, path):
        figure = Figure(figsize=(4, 2))
        figure.text(0.9, 0.5, "beyond the right edge")
        figure.text(0.1, 0.5, "one")
        figure.text(0.1, 0.51, "another")
        figure.savefig(path)

    assert faults(drawn(spoiled, None)) == ["beyond the right edge", "one | another"]


def test_every_line_of_the_report_says_which_side_is_better(drawn):
    axes = drawn(plot_report, evaluation()).axes
    labels = [label.get_text() for panel in axes[:3] for label in panel.get_yticklabels()]
    assert "capitals (erased), ranked by PMI ←" in labels and "general (far), ranked by PMI →" in labels
    assert labels and all(label[-1] in "←→" for label in labels)


def test_every_term_that_was_logged_is_drawn(drawn):
    log = [{"step": step, "state_loss": 1 / step, "retain_loss": 0.1, "eval_retain_loss": 0.2} for step in range(1, 9)]
    losses = drawn(plot_report, recent_report() | {"training_log": [*log, {"step": 8, "train_loss": 0.3}]}).axes[-1]
    assert [line.get_label() for line in losses.lines] == ["state", "retain"]


@pytest.mark.parametrize(("plot", "made"), [(plot_attacks, attacks), (draw, benchmark), (plot_report, evaluation)])
def test_no_name_of_the_program_stands_in_a_picture(plot, made, drawn):
    for text in texts_of(drawn(plot, made())):
        assert "_" not in text.get_text() and ".pmi" not in text.get_text()
