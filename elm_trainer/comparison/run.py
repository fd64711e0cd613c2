"""`compare_methods`: for each method the search, the final runs of all seeds, each for both budgets, and the attacks."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import median_high
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import set_seed

from ..attacks import attack_erasure, built_in_target, load_attacks
from ..evaluation.pair import ModelPair
from ..evaluation.report import environment
from ..files import MissingRunError, Runs, discard, discard_unfinished, replacing, write_json
from ..methods.forward import NonFiniteLossError
from ..modeling import lora_config
from ..run_lock import only_run_in
from .config import METHODS, Bench, ComparisonConfig, Reference, from_json, measure_reference
from .report import choose, make_report, score, summarize, with_pools


# The run ends when both budgets are used; the rate is constant, so nothing depends on this number.
_NO_END = 1_000_000


class Snapshot(NamedTuple):
    """An adapter on the way."""

    updates: int
    seconds: float  # since the run began, set-up included
    state: Mapping[str, torch.Tensor]  # empty after no update


class Budgets(TrainerCallback):
    """Keeps the adapter after so many updates and the last one within so many seconds, then ends the run.

    Args:
        updates (`int`): Budget in updates.
        seconds (`float`, *optional*): Budget in seconds since this was made.

    Attributes:
        setup (`float`): Seconds before the first update: tokens, teachers, targets, labels, reference log-probabilities.
        snapshots (`dict[str, Snapshot]`): The adapters by budget, `"updates"` and, where one was set, `"seconds"`; one
            that a failure came before is missing.
        failed (`str`, *optional*): Why the run ended early: a loss or a weight became NaN or infinite.
    """

    def __init__(self, updates: int, seconds: float | None):
        self._updates, self._seconds, self._started = updates, seconds, time.perf_counter()
        self.setup = 0.0
        self.failed: str | None = None
        self.snapshots: dict[str, Snapshot] = {}
        self._within = Snapshot(0, 0.0, {})

    def on_train_begin(self, args, state, control, **kwargs):
        self.setup = time.perf_counter() - self._started
        self._within = Snapshot(0, self.setup, {})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = time.perf_counter() - self._started
        open_ended = self._seconds is not None and "seconds" not in self.snapshots
        if open_ended and now > self._seconds:
            self.snapshots["seconds"] = self._within
            open_ended = False
        if open_ended or state.global_step == self._updates:
            # Without the last argument PEFT would look on the Hub, at every update, whether the vocabulary has grown.
            state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in state_dict.items()}
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                self.failed = f"Weights became NaN or infinite by update {state.global_step}."
                control.should_training_stop = True
                return
            self._within = Snapshot(state.global_step, now, tensors)
            if state.global_step == self._updates:
                self.snapshots["updates"] = self._within
        if "updates" in self.snapshots and not open_ended:
            control.should_training_stop = True


@contextmanager
def trained(
    bench: Bench, method: str, index: int, seed: int, *, seconds: float | None = None
) -> Iterator[tuple[PeftModel, Budgets]]:
    """Train a method in one of its settings; the model is handed back without its adapter.

    Args:
        method: One of `METHODS`.
        index: Which setting of its grid.
        seconds: Budget in seconds, beside that in updates.
    """
    config = bench.config
    model, dataset = bench.model, bench.dataset(seed)
    set_seed(seed)  # of new adapters
    with tempfile.TemporaryDirectory() as folder:
        updates = config.updates_of(method)
        steps = updates if seconds is None else _NO_END
        args = config.arguments(method, index, seed=seed, output_dir=folder, max_steps=steps)
        budgets = Budgets(updates, seconds)
        if hasattr(args, "targets_dir"):
            # The run makes its own targets: their time is part of what is compared.
            args.targets_dir = str(Path(folder) / "targets")
        trainer = METHODS[method].trainer(
            model,
            args,
            train_dataset=dataset,
            processing_class=bench.processing_class,
            peft_config=lora_config(model, **config.lora_shape(method)),
        )
        try:
            trainer.add_callback(budgets)
            trainer.remove_callback(PrinterCallback)  # without bars it would print every log
            try:
                trainer.train()
            except NonFiniteLossError as error:
                budgets.failed = str(error)
            yield trainer.model, budgets
        finally:
            trainer.model.unload()


class MethodRun:
    """The runs of one method, each kept in a file of its own as soon as it is finished.

    Args:
        config ([`ComparisonConfig`]): Settings.
        method (`str`): One of `METHODS`.
        runs ([`Runs`]): Where finished runs are.
        reference ([`Reference`]): What all methods share.
        seconds (`float`, *optional*): Budget of the table of equal time; the method that sets it has none.
    """

    def __init__(
        self, config: ComparisonConfig, method: str, runs: Runs, reference: Reference, seconds: float | None = None
    ):
        self.config, self.method, self.seconds = config, method, seconds
        self._runs, self._reference = runs, reference
        self._bench = Bench(config, reference.processing_class)
        self._has_trained = False

    def run(self) -> dict[str, Any]:
        """`search` (one entry per setting), `chosen`, `finals` by seed, and `attacks`, the report of these or `None`."""
        search = self.search()
        chosen = 0 if len(search) == 1 else choose([entry["score"] for entry in search])
        finals = {} if chosen is None else {str(seed): self.final(chosen, seed) for seed in self.config.seeds}
        attacks, first = None, self.config.seeds[0]
        if chosen is not None and self.config.ladder and "items" in finals[str(first)]["budgets"]["updates"]:
            attacks = self.attacks(chosen, first)
        return {"search": search, "chosen": chosen, "finals": finals, "attacks": attacks}

    def search(self) -> list[dict[str, Any]]:
        """Train every setting for the budget in updates and measure it on the dev split; a single one needs none."""
        config = self.config
        count = len(config.settings(self.method).grid)
        if count == 1:
            return [{"settings": config.chosen(self.method, 0), "score": None, "seconds": 0.0}]
        entries = []
        for index in range(count):
            found = self._runs.once(
                f"search-{self.method}-{index}",
                self._depends(index, config.search_seed, split="dev"),
                partial(self._search_one, index),
            )
            entry = {key: value for key, value in found.items() if key != "items"}
            entry |= {"settings": config.chosen(self.method, index), "score": None}
            if "items" in found:
                roles, before = self._reference.suites["dev"].roles, from_json(self._reference.items["dev"])
                pooled, known = (with_pools(items, before, roles) for items in (from_json(found["items"]), before))
                entry["score"] = score({name: summarize(known[name], [pooled[name]]) for name in pooled}, roles)
            entries.append(entry)
        return entries

    def final(self, index: int, seed: int) -> dict[str, Any]:
        """Train the chosen setting for both budgets and measure both models on the test split."""
        return self._runs.once(*self._final(index, seed), partial(self._final_one, index, seed))

    def attacks(self, index: int, seed: int) -> dict[str, Any]:
        """Attack the model of the budget in updates that [`final`] has left."""
        config = self.config
        assert config.ladder is not None
        ladder, bank = load_attacks(config.ladder), config.own_questions("test")
        final, name = self._final(index, seed), f"attacks-{self.method}"
        depends = {
            "final": final[1],
            "ladder": [{"attack": attack.name, **asdict(attack)} for attack in ladder],
            "questions": config.attack_questions,
            **({"bank": [asdict(question) for question in bank]} if bank else {}),
        }

        def run() -> dict[str, Any]:
            model = PeftModel.from_pretrained(self._bench.model, self._runs.path(*final))
            try:
                target = built_in_target(
                    ModelPair(model), self._bench.processing_class, config.concept, config.attack_questions,
                    bank=bank, forget=self._bench.dataset(seed).unique("forget") if bank else (),
                )  # fmt: skip
                return attack_erasure(target, ladder, output_dir=self._runs.path(name, depends))
            finally:
                model.unload()

        return self._runs.once(name, depends, run)

    def _search_one(self, index: int) -> dict[str, Any]:
        begun = time.perf_counter()
        with trained(self._bench, self.method, index, self.config.search_seed) as (model, budgets):
            memory = self._memory()
            found = self._measure(model, budgets, "updates", "dev")
        return found | memory | {"seconds": time.perf_counter() - begun}

    def _final_one(self, index: int, seed: int) -> dict[str, Any]:
        begun = time.perf_counter()
        with trained(self._bench, self.method, index, seed, seconds=self.seconds) as (model, budgets):
            memory = self._memory()
            names = ["updates"] if self.seconds is None else ["updates", "seconds"]
            found = {budget: self._measure(model, budgets, budget, "test") for budget in names}
            if seed == self.config.seeds[0] and "updates" in budgets.snapshots:
                set_peft_model_state_dict(model, budgets.snapshots["updates"].state)
                folder = self._runs.path(*self._final(index, seed))
                discard(folder)
                with replacing(folder) as unfinished:
                    model.save_pretrained(str(unfinished), save_embedding_layers=False)
        return {"setup": budgets.setup, "budgets": found, "seconds": time.perf_counter() - begun, **memory}

    def _measure(self, model: PeftModel, budgets: Budgets, budget: str, split: str) -> dict[str, Any]:
        """`updates`, `training_seconds` and `items` of the model of a budget, or why it `failed`."""
        if budget not in budgets.snapshots:
            return {"failed": budgets.failed}
        snapshot = budgets.snapshots[budget]
        found: dict[str, Any] = {"updates": snapshot.updates, "training_seconds": snapshot.seconds}
        if not snapshot.state:
            # No update ended within the budget: the model is still the reference.
            return found | {"items": self._reference.items[split]}
        set_peft_model_state_dict(model, snapshot.state)
        items = self._bench.measure(ModelPair(model), self._reference.suites[split], "erased")
        for name, measured in items.items():
            if not all(map(math.isfinite, measured["values"])):
                return {"failed": f"`{name}` of the model after {snapshot.updates} updates is not finite."}
        return found | {"items": items}

    def _memory(self) -> dict[str, int | None]:
        """Peak memory of the first training in this process; later it would be that of what was measured, too."""
        first, self._has_trained = not self._has_trained, True
        found = environment({})
        return {key: found[key] if first else None for key in ("peak_memory_bytes", "peak_device_memory_bytes")}

    def _final(self, index: int, seed: int) -> tuple[str, dict[str, Any]]:
        """Name of a final run, and what it depends on."""
        depends = self._depends(index, seed, split="test") | {"seconds": self.seconds}
        return f"final-{self.method}-seed{seed}", depends

    def _depends(self, index: int, seed: int, *, split: str) -> dict[str, Any]:
        config = self.config
        return self._reference.identity[split] | {
            "data": self._reference.data[str(seed)],
            "method": self.method,
            "settings": config.chosen(self.method, index),
            "lora": dict(config.lora_shape(self.method)),
            "training": config.training,
            "updates": config.updates_of(self.method),
            "seed": seed,
        }


def seconds_of(result: Mapping[str, Any]) -> float | None:
    """Median seconds of a method's final runs until the budget in updates was used; `None` if all failed."""
    budgets = [final["budgets"]["updates"] for final in result["finals"].values()]
    found = [entry["training_seconds"] for entry in budgets if "failed" not in entry]
    return median_high(found) if found else None


Result = TypeVar("Result")


def compare_methods(config: ComparisonConfig) -> dict[str, Any]:
    """Compare erasure methods on the same data, with the same budgets and the same search.

    Each method is trained in every setting of its grid and measured on the dev split; the best setting by one rule is
    trained again with every seed, and measured on the test split: after so many updates, and after so many seconds. What
    is finished lies in `output_dir/runs`; a stopped comparison continues with what is not.

    Args:
        config ([`ComparisonConfig`]): Settings.

    Raises:
        FolderInUseError: if another run writes to `output_dir`.

    Returns:
        `dict`: the report, which is also written to `output_dir/report.json`. `tables` holds, for the budgets
        `"updates"` and `"seconds"`, each method's `figures`, `verdict` and `score`; `methods` its settings, search and
        costs; `claims` what the seed paper says of them; `beaten` where a rival is better than ELM; `attacks` what comes
        back under attack.
    """
    with only_run_in(config.output_dir):
        folder = Path(config.output_dir) / "runs"
        discard_unfinished(folder)
        reference = _apart(measure_reference, config, Runs(folder))
        results: dict[str, dict[str, Any]] = {}
        seconds = None
        # The one that sets the time goes first.
        for method in tqdm([config.clock, *(name for name in config.methods if name != config.clock)], desc="Methods"):
            try:
                results[method] = MethodRun(config, method, Runs(folder, only_read=True), reference, seconds).run()
            except MissingRunError:
                results[method] = _apart(MethodRun(config, method, Runs(folder), reference, seconds).run)
            if method == config.clock:
                seconds = seconds_of(results[method])
        report = make_report(config, reference, {name: results[name] for name in config.methods}, seconds)
        write_json(Path(config.output_dir) / "report.json", report)
        return report


def _apart(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in a process of its own: its peak of memory is its own, and all of it is freed."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        return pool.submit(function, *args).result()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: what was killed must not train on beside its successor."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()
