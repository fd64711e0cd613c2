"""Each kind of launch is made once, with all the runs that any test asks of it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.methods.methods import METHODS

from .launching import launch
from .train import Run


class Launched(NamedTuple):
    """What came of a launch.

    Attributes:
        folder (`Path`): Where the runs are.
        results (`dict[str, dict[str, Any]]`): Results of the runs by name.
    """

    folder: Path
    results: dict[str, dict[str, Any]]


# The methods that differ in what they ask of a launch: hidden states and a cut stack (RMU), readings of their own
# (RepNoise), a second model and its teacher (WHP), the reference's likelihoods (NPO). DistributedDataParallel runs all.
SPREAD = ("elm", "npo", "rmu", "whp")


def runs(rows: int, methods: Iterable[str] = METHODS) -> list[Run]:
    """The runs of a launch, with as many rows as a process is to take of the four of a step."""
    live = {"precompute_targets": False}
    saving = {"save_strategy": "steps", "save_steps": 3}
    return [
        Run("elm", rows=rows, fields=live | saving, compare_reference=True),
        *(Run(name, name, rows, dict(METHODS[name].per_text)) for name in methods if name != "elm"),
        Run("repnoise-whole", "repnoise", rows),
        Run("accumulated", rows=1, fields=live | {"gradient_accumulation_steps": rows}),
        Run("checkpointed", rows=rows, fields=live | {"gradient_checkpointing": True}),
        Run("rmu-checkpointed", "rmu", rows=rows, fields={"gradient_checkpointing": True}),
        Run("stored", rows=rows, fields={"precompute_targets": True}),
        Run("resumed", rows=rows, fields=live, resume="elm/checkpoint-3"),
    ]


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> Launched:
    """One process."""
    folder = tmp_path_factory.mktemp("single")
    return Launched(folder, launch("single", runs(4), folder))


@pytest.fixture(scope="session")
def launched(tmp_path_factory, single) -> Callable[[str], Launched]:
    """Gives what came of two processes under a kind of launch."""
    known: dict[str, Launched] = {}

    def get(kind: str) -> Launched:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            live = {"precompute_targets": False}
            from_single = Run("from-single", rows=2, fields=live, resume=str(single.folder / "elm" / "checkpoint-3"))
            methods = METHODS if kind == "ddp" else SPREAD
            known[kind] = Launched(folder, launch(kind, [*runs(2, methods), from_single], folder))
        return known[kind]

    return get
