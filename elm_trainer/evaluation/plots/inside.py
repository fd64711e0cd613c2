"""The picture of what is inside both models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...files import replacing


COLOURS = {"reference": "tab:grey", "erased": "tab:orange"}


def plot_inside(inside: Mapping[str, Any], path: str | Path) -> None:
    """Draw what [`~elm_trainer.evaluation.inside.look_inside`] returns, four panels over the layers, into a PNG file."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    (probe, lens), (norms, ranks) = figure.subplots(2, 2)
    for side, colour in COLOURS.items():
        _curve(probe, inside["probe"][side]["accuracy"], colour, side)
        control = [point["value"] for point in inside["probe"][side]["control"]]
        probe.plot(control, linestyle=":", color=colour, label=f"{side}, labels shuffled")
        _curve(lens, inside["logit_lens"][side]["accuracy"], colour, side)
    probe.axhline(0.5, color="black", linestyle="--", linewidth=1, label="chance")
    probe.set(title="Linear probe: is the statement true?", ylabel="accuracy", ylim=(0.3, 1.02))
    lens.axhline(inside["logit_lens"]["chance"], color="black", linestyle="--", linewidth=1, label="chance")
    lens.set(title="Logit lens: the right option's first token leads", ylabel="accuracy", ylim=(0, 1.02))
    for text, colour in (("forget", "tab:red"), ("retain", "tab:blue")):
        _curve(norms, inside["norms"][text]["ratio"], colour, f"{text} text")
    norms.axhline(1, color="black", linestyle="--", linewidth=1)
    norms.set(title="Size of the hidden states", ylabel="L2 norm, erased / reference")
    norms.ticklabel_format(axis="y", useOffset=False)
    hidden = inside["effect_rank"]["hidden"]
    tokens = hidden["tokens"]
    ranks.plot(
        hidden["effective_rank"], marker=".", color="tab:green", label=f"change of hidden states ({tokens} tokens)"
    )
    # The state behind a layer comes after the embeddings' and so has the next number.
    points = [
        (weight["layer"] + 1, weight["effective_rank"])
        for weight in inside["effect_rank"]["weights"] or []
        if weight["layer"] is not None
    ]
    if points:
        ranks.plot(*zip(*points, strict=True), "x", color="tab:purple", alpha=0.6, label="change of an adapted weight")
    ranks.set(title="Effective rank of the erasure's effect", ylabel="effective rank", ylim=(0, None))
    for axes in (probe, lens, norms, ranks):
        axes.set(xlabel="layer (0: embeddings)", xlim=(0, len(hidden["effective_rank"]) - 1))
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100)


def _curve(axes: Any, points: Sequence[Mapping[str, float]], colour: str, label: str) -> None:
    axes.plot([point["value"] for point in points], marker=".", color=colour, label=label)
    low, high = ([point[end] for point in points] for end in ("low", "high"))
    axes.fill_between(range(len(points)), low, high, color=colour, alpha=0.2, linewidth=0)
