"""Time and memory as the number of samples grows: `growth`."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from elm_trainer.modeling import DEMO_MODEL

from .figures import Figure, ratios
from .shapes import Adapter, ModelShape
from .sides import Side, train
from .workers import take_turns, workers


BATCH = 4
# A model so small that ten thousand samples take minutes: what could grow is not the model's.
SMALL = ModelShape(hidden=64, intermediate=128, layers=4, heads=4, kv_heads=2, vocab=49152)
SIDE = Side("elm", 0, BATCH, model=SMALL, adapter=Adapter(rank=8, layers=(2, 3)), short=True, epochs=1)
REAL = replace(SIDE, model=DEMO_MODEL, adapter=Adapter(rank=32, layers=tuple(range(6, 22))))
SIZES = (100, 1_000, 10_000)
REAL_SIZES = (100, 1_000)


def measure_growth(repeats: int, threads: int, side: Side = SIDE, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Train once through 100, 1,000 and 10,000 samples, each with all its targets made before.

    The sizes take turns: in every round each does its share of its own steps, so that all are spread over the same time.

    Args:
        repeats (`int`): Rounds.
        threads (`int`): Threads of every side.
        side (`Side`, *optional*): What is trained; its number of samples is replaced.
        sizes (`Sequence[int]`, *optional*): Numbers of samples, the baseline first.

    Returns:
        `dict[str, Any]`: the figure: seconds per sample of the largest size / the smallest, with the other ratios, memory
        and set-up.
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
            "seconds_per_sample": {name: statistics.median(values) for name, values in seconds.items()},
            "time_ratios": {name: statistics.median(ratios(seconds[name], seconds[smallest])) for name in sides},
            "peak_bytes": peaks,
            "memory_ratios": {name: peaks[name] / peaks[smallest] for name in sides},
            "added_bytes": {name: max(block["added"] for block in rounds[name]) for name in sides},
            "setup_seconds_per_sample": {
                name: {part: value / sides[name].samples for part, value in ready[name]["setup"].items()}
                for name in sides
            },
        },
    ).record()
