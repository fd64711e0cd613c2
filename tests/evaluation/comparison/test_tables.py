import io
import math

import pytest
from rich.console import Console

from elm_trainer.comparison.report import _beaten, headlines, paper_claims, summarize
from elm_trainer.comparison.tables import (
    beaten_rows,
    claim_rows,
    first_paragraph,
    markdown_comparison,
    render_comparison,
    table_rows,
)
from elm_trainer.evaluation.statistics import Items


NAMES = [*headlines("capitals")]


def items(share, perplexity):
    """Items of every headline figure: a share of rights, or a perplexity."""
    return {
        name: Items("perplexity", [perplexity * 10.0] * 20, [10.0] * 20)
        if "ppl" in name or "perplexity" in name
        else Items("mean", [float(index < share * 20) for index in range(20)])
        for name in NAMES
    }


def report(methods, worst):
    """A report of made-up items by method, each with a score."""
    before = items(0.8, 1.0)
    rows = {}
    for method, found in methods.items():
        figures = {name: summarize(before[name], [found[name]]) for name in NAMES}
        verdict = {
            name: {"state": "holds" if worst[method] <= 1 else "fails", "checks": []}
            for name in ("innocence", "seamlessness", "specificity")
        }
        rows[method] = {
            "updates": [12], "seconds": [50.0], "failed": {}, "figures": figures, "verdict": verdict,
            "score": {"worst": worst[method], "mean": 1.0, "innocence": 1.0, "seamlessness": 1.0, "specificity": 1.0},
        }  # fmt: skip
    runs = {method: {0: found} for method, found in methods.items()}
    return {
        "concept": "capitals",
        "rule": "A rule.",
        "recipe": {"clock": "elm", "seeds": [0], "model": "a model", "lora_rank": 2, "lora_layers": None, "lora_targets": "all-linear"},
        "methods": {
            method: {
                "label": method.upper(), "adapter": {"rank": 2, "layers": None, "targets": "all-linear"},
                "search": [{"settings": {"learning_rate": 1.0}, "score": None, "seconds": 0.0}], "chosen": 0,
                "setup_seconds": 1.0, "seconds_per_sample": 0.1, "total_seconds": 9.0, "peak_memory_bytes": 2e9,
            }
            for method in methods
        },
        "tables": {budget: {"budget": 12, "methods": rows} for budget in ("updates", "seconds")},
        "claims": paper_claims({}, "capitals", "updates"),
        "beaten": [entry for budget in ("updates", "seconds") for entry in _beaten(budget, runs, before, "capitals")],
        "attacks": {},
        "samples": [],
    }  # fmt: skip


def test_a_rival_that_is_better_is_named_with_its_figures():
    made = report({"elm": items(0.5, 1.2), "npo": items(0.1, 1.2)}, {"elm": 2.0, "npo": 1.5})
    beaten = {entry["figure"] for entry in made["beaten"]}
    assert beaten == {
        name for name in NAMES if "capitals" in name or "families" in name
    }  # near and far are worse, perplexities are equal
    text = first_paragraph(made)
    assert text.startswith(
        "With a set number of updates, NPO (1.50) comes nearer to keeping all bounds at once than ELM (2.00"
    )
    assert "ELM is beaten by NPO on concept by PMI, concept by likelihood, all ways of asking by PMI, " in text
    assert [row[2:5] for row in beaten_rows(made)][1][0] == "concept by PMI"
    assert beaten_rows(made)[1][3].startswith("0.100 [") and beaten_rows(made)[1][5].startswith("-0.400 [")


def test_a_method_with_updates_of_its_own_is_named_with_them():
    made = report({"elm": items(0.5, 1.2), "npo": items(0.1, 1.2)}, {"elm": 2.0, "npo": 1.5})
    made["recipe"] |= {"methods": {"elm": {"grid": [{}], "updates": 1000}, "npo": {"grid": [{}], "updates": None}}}
    titles = [line for line in markdown_comparison(made).splitlines() if line.startswith("## ")]
    assert titles[:2] == [
        "## A set number of updates: 12, ELM 1000",
        "## The same wall-clock time: 12 s (ELM's, set-up included)",
    ]


def test_no_rival_that_is_better_is_said_too():
    text = first_paragraph(report({"elm": items(0.5, 1.0), "npo": items(0.5, 1.0)}, {"elm": 1.0, "npo": 1.5}))
    assert text.count("no rival comes nearer") == text.count("On no single figure is it beaten") == 2
    assert "read these beside innocence" not in text


def test_a_lower_perplexity_and_more_other_knowledge_beat_elm():
    made = report({"elm": items(0.5, 1.2), "npo": items(0.9, 1.0)}, {"elm": 1.0, "npo": 1.5})
    assert {entry["figure"] for entry in made["beaten"]} == {
        "fluency.greedy.r_ppl", "specificity.near", "specificity.far", "retention.perplexity"
    }  # fmt: skip
    ratios = [entry["difference"]["value"] for entry in made["beaten"] if entry["statistic"] == "perplexity"]
    assert ratios == pytest.approx([math.exp(1.0 - 1.2)] * 4)


def test_tables_name_every_method_and_the_reference():
    made = report({"elm": items(0.5, 1.2), "npo": items(0.1, 1.2)}, {"elm": 2.0, "npo": 0.5})
    header, *rows = table_rows(made, "seconds")
    assert [row[0] for row in rows] == ["reference", "ELM", "NPO"] and {len(row) for row in rows} == {len(header)}
    assert rows[1][-3:] == ["fails"] * 3 and rows[2][-3:] == ["holds"] * 3
    tables = render_comparison(made)
    console = Console(width=80, file=io.StringIO())
    console.print(*tables)
    printed = console.file.getvalue()
    assert len(tables) == 4 and max(map(len, printed.splitlines())) <= 80
    assert {"reference", "ELM", "NPO", "seamlessness"} <= set(printed.split()) and "2.00" in printed


def test_claims_that_are_not_measured_say_so():
    assert {row[2] for row in claim_rows(report({"elm": items(0.5, 1.2)}, {"elm": 1.0}))[1:]} == {"not measured"}
