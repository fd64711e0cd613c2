"""An ELM step beside fine-tuning and the released loop: `time_vs_*`, `memory_vs_*` and `released_time_vs_ours`; and as the
number of samples grows: `growth`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from transformers.utils import logging

from elm_trainer.modeling import DEMO_MODEL

from .report import Figure, medians, ratios
from .shapes import Adapter, ModelShape
from .sides import Side, train
from .workers import take_turns, workers


logger = logging.get_logger(__name__)
# Every side updates the adapter once in four samples, as released; they differ in how many run at a time.
SAMPLES = 4
ELM_CANDIDATES = [Side("elm", SAMPLES, batch, SAMPLES // batch) for batch in (1, 2, 4)]
SFT_PLAIN = Side("sft", SAMPLES, 3 * SAMPLES)
SFT_CANDIDATES = [
    *(Side("sft", SAMPLES, texts, 3 * SAMPLES // texts) for texts in (1, 3, 4, 6)),
    SFT_PLAIN,
    Side("sft", 2 * SAMPLES, 6 * SAMPLES),
    Side("sft", SAMPLES, 4, 3, group_by_length=True),
    Side("sft", SAMPLES, 3, 4, padding_free=True),
]
RELEASED = Side("released", SAMPLES, 1, SAMPLES)


def measure_step(repeats: int, threads: int) -> dict[str, Any]:
    """Find the fastest setting of ELM and of fine-tuning, then let these take turns with the other baselines."""
    found_elm, found_sft = (search(candidates, threads) for candidates in (ELM_CANDIDATES, SFT_CANDIDATES))
    sides = {"elm": fastest(found_elm), "best_sft": fastest(found_sft), "sft_batch4": SFT_PLAIN, "released": RELEASED}
    with workers({name: (train, (side,)) for name, side in sides.items()}, threads) as started:
        once = dict.fromkeys(sides, 1)
        take_turns(started, 1, once)
        rounds = take_turns(started, repeats, once)
        setup = {name: worker.ready for name, worker in started.items()}
    seconds = {
        name: [block["seconds"] / sides[name].samples_per_update for block in blocks]
        for name, blocks in rounds.items()
    }
    peak, added = (
        {name: [block[key] for block in blocks] for name, blocks in rounds.items()} for key in ("peak", "added")
    )
    settings = {name: side.setting() for name, side in sides.items()}
    memory = {
        "peak_bytes": {name: peak[name] for name in ("elm", "sft_batch4")},
        "added_bytes": {name: added[name] for name in ("elm", "sft_batch4")},
        "added_ratio": ratios(added["elm"], added["sft_batch4"]),
        "setup_peak_bytes": {name: setup[name]["setup_peak"] for name in ("elm", "sft_batch4")},
    }

    def details(*names: str) -> dict[str, Any]:
        return {
            "settings": {name: settings[name] for name in names},
            "seconds_per_sample": {name: seconds[name] for name in names},
        }

    return {
        "time_vs_best_sft": Figure(
            "seconds per sample, ELM / the fastest fine-tuning found",
            ratios(seconds["elm"], seconds["best_sft"]),
            at_most=1.10,
            details=details("elm", "best_sft") | {"search": {"elm": _table(found_elm), "sft": _table(found_sft)}},
        ).record(),
        "time_vs_sft_batch4": Figure(
            "seconds per sample, ELM / fine-tuning of four samples at a time",
            ratios(seconds["elm"], seconds["sft_batch4"]),
            at_most=0.75,
            details=details("elm", "sft_batch4"),
        ).record(),
        "memory_vs_sft_batch4": Figure(
            "peak memory of the whole process in a step, ELM / fine-tuning of four samples at a time",
            ratios(peak["elm"], peak["sft_batch4"]),
            at_most=0.5,
            details={"settings": {name: settings[name] for name in ("elm", "sft_batch4")}} | memory,
        ).record(),
        "released_time_vs_ours": Figure(
            "seconds per sample, released loop / ELM",
            ratios(seconds["released"], seconds["elm"]),
            at_least=1.8,
            details=details("released", "elm") | {"setup_seconds": setup["elm"]["setup"]},
        ).record(),
    }


def search(candidates: Iterable[Side], threads: int) -> list[tuple[Side, float, int]]:
    """Run each setting alone, and give its seconds per sample and its peak of memory after one update that warms it up."""
    found = []
    for side in candidates:
        with workers({side.setting(): (train, (side,))}, threads) as started:
            [worker] = started.values()
            worker.run(1)
            block = worker.run(1)
        found.append((side, block["seconds"] / side.samples_per_update, block["peak"]))
        logger.info(f"{side.trainer}, {side.setting()}: {found[-1][1]:.2f} s per sample")
    return found


def fastest(found: list[tuple[Side, float, int]]) -> Side:
    """The setting of fewest seconds per sample."""
    return min(found, key=lambda entry: entry[1])[0]


def _table(found: list[tuple[Side, float, int]]) -> list[dict[str, Any]]:
    return [
        {"setting": side.setting(), "seconds_per_sample": seconds, "peak_bytes": peak} for side, seconds, peak in found
    ]


# A model so small that ten thousand samples take minutes: what could grow is not the model's.
SMALL = ModelShape(hidden=64, intermediate=128, layers=4, heads=4, kv_heads=2, vocab=49152)
SIDE = Side("elm", 0, 4, model=SMALL, adapter=Adapter(rank=8, layers=(2, 3)), short=True, epochs=1)
REAL = replace(SIDE, model=DEMO_MODEL, adapter=Adapter(rank=32, layers=tuple(range(6, 22))))
SIZES = (100, 1_000, 10_000)
REAL_SIZES = (100, 1_000)


def measure_growth(repeats: int, threads: int, side: Side = SIDE, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Train a side once through so many samples, the baseline's number first, each with all its targets made before.

    The sizes take turns: in every round each does its share of its own steps, so that all are spread over the same time.
    """
    sides = {str(size): replace(side, samples=size) for size in sizes}
    # One update warms up; the last block ends with the last sample.
    blocks = {name: (side.samples // side.batch - 1) // repeats for name, side in sides.items()}
    if short := [name for name, updates in blocks.items() if updates < 1]:
        raise ValueError(f"`sizes` has {', '.join(short)}, too few for {repeats} blocks of updates: raise them.")
    with workers({name: (train, (side,)) for name, side in sides.items()}, threads) as started:
        first = {name: side.samples // side.batch - repeats * blocks[name] for name, side in sides.items()}
        take_turns(started, 1, first)
        rounds = take_turns(started, repeats, blocks)
        ready = {name: worker.ready for name, worker in started.items()}
    samples = {name: blocks[name] * sides[name].batch for name in sides}
    seconds = {name: [block["seconds"] / samples[name] for block in rounds[name]] for name in sides}
    smallest, largest = str(sizes[0]), str(sizes[-1])
    peaks = {name: max(block["peak"] for block in rounds[name]) for name in sides}
    return Figure(
        f"seconds per sample, {largest} samples / {smallest} samples",
        ratios(seconds[largest], seconds[smallest]),
        at_most=1.1,
        at_least=0.9,
        details={
            "model": side.model if isinstance(side.model, str) else f"random weights, {side.model}",
            "settings": side.setting(),
            "updates": {name: first[name] + repeats * blocks[name] for name in sides},
            "seconds_per_sample": medians(seconds),
            "time_ratios": medians({name: ratios(seconds[name], seconds[smallest]) for name in sides}),
            "peak_bytes": peaks,
            "memory_ratios": {name: peaks[name] / peaks[smallest] for name in sides},
            "added_bytes": {name: max(block["added"] for block in rounds[name]) for name in sides},
            "setup_seconds_per_sample": {
                name: {part: value / sides[name].samples for part, value in ready[name]["setup"].items()}
                for name in sides
            },
        },
    ).record()
