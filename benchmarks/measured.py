"""The formulas of `prediction` beside what three sizes of model measure: `prediction`."""

import statistics
import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F

from elm_trainer.data.packing import best_rows
from elm_trainer.head import CHUNK
from elm_trainer.methods.forward import ATTENTION

from .prediction import Device, StepShape, memory, moved_bytes, step_flops, step_seconds
from .report import Figure, ratios
from .shapes import Adapter, ModelShape
from .sides import Side, tokenized_samples, train
from .workers import Pacer, take_turns, workers


SHAPES = {
    "10M": ModelShape(hidden=160, intermediate=432, layers=8, heads=5, kv_heads=5, vocab=49152),
    "50M": ModelShape(hidden=384, intermediate=1024, layers=20, heads=6, kv_heads=2, vocab=49152),
    "135M": ModelShape(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocab=49152),
}
# Every tensor of some size is taken from the system and given back at once, so that what is held is what is in use. It is
# slow, and for counting only: times, and memory in comparisons, are measured with the allocator as it is.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ADAPTER = Adapter(rank=64, layers=(2, 3, 4, 5))
SAMPLES, BATCH = 4, 2


def measure_prediction(repeats: int, threads: int) -> dict[str, Any]:
    """Train models of random weights, and compare seconds and memory of a step with the formulas.

    The device's rates are measured where the step is, right before it in every round: they are inputs of the formula, and a
    busy machine changes both. The figure is predicted / measured seconds, and has the same for memory, by model.
    """
    sides = {name: Side("elm", SAMPLES, BATCH, model=shape, adapter=ADAPTER) for name, shape in SHAPES.items()}
    steps = {name: mean_step(side, SHAPES[name]) for name, side in sides.items()}
    with workers({name: (train_with_rates, (side, steps[name])) for name, side in sides.items()}, threads) as started:
        once = dict.fromkeys(sides, 1)
        take_turns(started, 1, once)
        rounds = take_turns(started, repeats, once)
    with workers({name: (train, (side,)) for name, side in sides.items()}, threads, EXACT_MEMORY) as started:
        held = {name: worker.run(2)["added"] for name, worker in started.items()}
    models = {}
    for name, shape in SHAPES.items():
        blocks, step = rounds[name], steps[name]
        predicted = [
            step_seconds(shape, ADAPTER, step, Device(block["flops"], block["bandwidth"])) for block in blocks
        ]
        need = memory(shape, ADAPTER, step)
        models[name] = {
            "parameters": shape.parameters,
            "seconds": statistics.median(block["seconds"] for block in blocks),
            "predicted_seconds": statistics.median(predicted),
            "time_ratio": statistics.median(ratios(predicted, [block["seconds"] for block in blocks])),
            "added_bytes": held[name],
            "predicted_added_bytes": need.added,
            "memory_ratio": need.added / held[name],
            "tokens": step.tokens,
            "positions": step.positions,
            "flops": step_flops(shape, ADAPTER, step),
            "moved_bytes": moved_bytes(shape, ADAPTER, step),
            "device_flops": statistics.median(block["flops"] for block in blocks),
            "device_bandwidth": statistics.median(block["bandwidth"] for block in blocks),
        }
    errors = {kind: max(abs(model[f"{kind}_ratio"] - 1) for model in models.values()) for kind in ("time", "memory")}
    return Figure(
        "predicted / measured seconds of a step, one round for each model",
        [model["time_ratio"] for model in models.values()],
        details={"models": models, "largest_error": errors},
    ).record()


def mean_step(side: Side, shape: ModelShape) -> StepShape:
    """Tokens of an average step of a side, in float32 on a CPU."""
    rows = tokenized_samples(side)
    names = ("forget_ids", "retain_ids", "synthetic_ids")
    lengths = [[len(row[name]) for name in names] for row in rows]
    # A batch is any choice of samples.
    batches = [[length for texts in chosen for length in texts] for chosen in combinations(lengths, side.batch)]
    packed = [(batch, best_rows(batch, ATTENTION * shape.hidden)) for batch in batches]
    widths = [max(sum(batch[text] for text in row) for row in rows) for batch, rows in packed]
    taken = [len(rows) * width for (_, rows), width in zip(packed, widths, strict=True)]
    # A text's first token is predicted by none, nor is a prompt.
    supervised = [sum(texts) - 2 - max(row["completion_start"], 1) for texts, row in zip(lengths, rows, strict=True)]
    return StepShape(
        round(statistics.mean(taken)),
        round(side.batch * statistics.mean(supervised)),
        round(statistics.mean(widths)),
        weight_bytes=4,
        bytes=4,
        mask_bytes=4,
        chunk=CHUNK,
    )


def train_with_rates(pacer: Pacer, folder: str, side: Side, step: StepShape) -> None:
    """Train a side, and measure after each block what matrix products and memory reach at its sizes."""
    assert isinstance(side.model, ModelShape)
    shape = side.model
    pacer.measure = lambda: rates(shape, step)
    train(pacer, folder, side)


def rates(shape: ModelShape, step: StepShape, seconds: float = 1.0, device: str = "cpu") -> dict[str, float]:
    """Operations per second of the model's own matrix products, and bytes per second of a sum of two tensors.

    Numbers have as many bytes as the step's activations: two are bfloat16.
    """
    made: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if step.bytes == 2 else torch.float32}
    states = torch.randn(step.tokens, shape.hidden, **made)
    matrices = [torch.randn(shape.intermediate, shape.hidden, **made), torch.randn(shape.hidden, shape.hidden, **made)]
    wide = torch.randn(step.tokens, shape.intermediate, **made)

    def products() -> None:
        for matrix in matrices:
            F.linear(states, matrix)
        wide @ matrices[0]

    operations = 2 * step.tokens * shape.hidden * (2 * shape.intermediate + shape.hidden)
    # Larger than any cache, as are the activations of a step together.
    large, other, out = torch.ones(3, 2**24 if device == "cpu" else 2**28, device=device)
    moved = 3 * large.numel() * large.element_size()
    # A CPU has done what it was told when a call returns.
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    return {
        "flops": operations / _seconds_of(products, seconds, wait),
        "bandwidth": moved / _seconds_of(lambda: torch.add(large, other, out=out), seconds, wait),
    }


def _seconds_of(work: Callable[[], Any], seconds: float, wait: Callable[[], None]) -> float:
    """Mean seconds of a call, over as many calls as fit: a step has its share of what disturbs the machine too."""
    work()
    wait()
    calls, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        # As many at a time as hide what it costs to wait for the device.
        for _ in range(4):
            work()
        wait()
        calls += 4
    return (time.perf_counter() - started) / calls
