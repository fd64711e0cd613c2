"""What is computed once before training: stored functions of frozen weights, and throw-away adapters."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import gather_object
from peft import LoraConfig, PeftModel
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.target_store import (
    RowTargets,
    TargetLayout,
    TargetStore,
    fill_store,
    reason_against,
    remove_locks,
)
from ..files import json_sha256
from ..fingerprint import base_fingerprint, bit_sums
from ..modeling import is_partitioned
from .base import ErasureTrainer
from .config import ErasureConfig
from .forward import nll_reading, place_model, visits


logger = logging.get_logger(__name__)
T = TypeVar("T")
PACKAGES = ("torch", "transformers", "peft")
# What a model's config says beside how it computes.
_NO_MATTER = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


@dataclass(frozen=True)
class TargetPlan:
    """What a method keeps for each training row.

    Args:
        switch: The config's field that asks for it: `True`, `False`, or `None` for the rule of [`reason_against`].
        layout: What is kept.
        settings: Every setting of the method that the targets depend on, as JSON holds it.
        columns: Columns of the tokenized dataset that they depend on.
        compute: Makes what is kept for each row, on the CPU, from a batch of the collator.
        contexts: Whether they depend on the collator's contexts.
        prepare: Gives the context that surrounds the computation.
        description: What the progress bar says.
    """

    switch: str
    layout: TargetLayout
    settings: Mapping[str, Any]
    columns: Sequence[str]
    compute: Callable[[dict[str, Any]], list[dict[str, torch.Tensor]]]
    contexts: bool = False
    prepare: Callable[[], AbstractContextManager[None]] = nullcontext
    description: str = "Computing targets"


def default_targets_dir() -> Path:
    """Where targets are kept by default: `elm_targets` in the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "elm_targets"


def precompute_targets(trainer: ErasureTrainer, plan: TargetPlan) -> RowTargets | None:
    """The targets of all training rows from the folder that is named after what they depend on.

    What is missing there is computed first, each process its share; so a second run computes nothing, and one that was
    killed continues after the last whole file. While it computes, a process holds the whole model, which is not wrapped yet,
    on its device. All processes must see the folder: on several nodes it must lie on a drive that they share, or each node must
    have been given the finished folder. Processes that wait for others do so at most `ddp_timeout` seconds.

    Returns:
        [`RowTargets`], or `None` where the step is to make its targets itself.

    Raises:
        OSError: if the folder can't be written to, the disk is full, or a process does not see what others have written.
        ValueError: if the weights are not whole in any process, and the store is not complete, or if processes have
            different data or settings.
    """
    wanted, dataset = getattr(trainer.args, plan.switch), trainer.train_dataset
    if wanted is False or dataset is None or not plan.layout.fields:
        return None
    rows, needed = len(dataset), plan.layout.total_bytes(_positions(dataset), len(dataset))
    against = partial(reason_against, rows=rows, visits=visits(trainer), needed=needed)
    if wanted is None and (reason := against(missing=0, free=0)):
        _make_live(plan, wanted, reason)
        return None

    states = _everywhere(lambda: (_weights(trainer), _ingredients(trainer, plan)))
    weights, ingredients = states[0]
    if any(other != ingredients for _, other in states):
        raise ValueError(
            "The processes have different training rows or settings: give each the same dataset and config."
        )
    if weights is None:
        reason = "the model's weights were offloaded, and can't be read to name the store"
        _make_live(plan, wanted, reason, "keep the model on devices, or set it to False")
        return None
    ingredients = ingredients | {"weights": weights}
    folder = Path(trainer.args.targets_dir or default_targets_dir())
    store = TargetStore(folder / json_sha256(ingredients), rows, plan.layout)

    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    own = range(rank, store.shards, processes)
    found = _everywhere(lambda: ([shard for shard in own if not store.is_whole(shard)], _free(folder)))
    missing = sorted(shard for shards, _ in found for shard in shards)
    if missing:
        if is_partitioned(trainer.model):
            reason = (
                f"ZeRO-3 has already split the model's weights over the processes, and {store.folder} is not complete"
            )
            fix = "build the trainer once in one process without DeepSpeed, which fills it"
            _make_live(plan, wanted, reason, f"{fix}, or set `{plan.switch}=False`")
            return None
        to_write = needed * len(missing) // store.shards
        if wanted is None and (reason := against(missing=to_write, free=found[0][1])):
            _make_live(plan, wanted, reason)
            return None
        # Only processes that hold the weights can compute: FSDP's frugal loading gives them to the first of a node.
        holders = [number for number, (held, _) in enumerate(states) if held == weights]
        share = missing[holders.index(rank) :: len(holders)] if rank in holders else []
        try:
            _everywhere(lambda: store.describe(ingredients))
            _everywhere(lambda: _fill(trainer, plan, store, share))
        except OSError as error:
            raise OSError(
                f"`targets_dir` {str(folder)!r}: the targets could not be written ({error}): free some space, name "
                f"another folder, or set `{plan.switch}=False`. The files that are finished stay, and the next run goes "
                "on from them."
            ) from error
    _everywhere(lambda: _check_seen(store, rank, plan.switch))
    if missing and trainer.accelerator.is_local_main_process:
        remove_locks(store)
    logger.info(f"Targets are in {store.folder}; {len(missing)} of {store.shards} files were computed.")
    columns = _columns(plan)
    return RowTargets(store, columns, dataset.select_columns(columns))


def _columns(plan: TargetPlan) -> list[str]:
    """The columns on which the targets of a row depend; a row draws its contexts by its number in the first dataset."""
    return sorted({*plan.columns, *(["row"] if plan.contexts else [])})


def batch_rows(args: ErasureConfig) -> int:
    """Rows of which targets are made at a time: without gradients there is room for the batch of evaluation."""
    return max(args.per_device_train_batch_size, args.per_device_eval_batch_size)


def _fill(trainer: ErasureTrainer, plan: TargetPlan, store: TargetStore, share: Sequence[int]) -> None:
    """Compute a process's share of the files."""
    if not share:
        return
    place_model(trainer)
    args, dataset = trainer.args, trainer.train_dataset
    # What a trainer before has had packed would be found first.
    collate = replace(trainer.data_collator, targets=None, packing=None)
    size = batch_rows(args)
    total = sum(len(store.rows_of(shard)) for shard in share)
    with (
        tqdm(total=total, desc=plan.description, disable=not trainer.accelerator.is_local_main_process) as bar,
        plan.prepare(),
    ):

        def compute(rows: range) -> list[dict[str, torch.Tensor]]:
            made: list[dict[str, torch.Tensor]] = []
            for start in range(rows.start, rows.stop, size):
                batch = [dataset[row] for row in range(start, min(start + size, rows.stop))]
                inputs = trainer.on_device(collate(batch), sharing=True)
                with trainer.accelerator.autocast():
                    made += plan.compute(inputs)
                bar.update(len(batch))
            return made

        fill_store(store, share, compute)


def _ingredients(trainer: ErasureTrainer, plan: TargetPlan) -> dict[str, Any]:
    """What the targets depend on beside the weights, the same in every process."""
    model, collator, dataset = trainer.model, trainer.data_collator, trainer.train_dataset
    rows = dataset["row"][:]
    with_contexts = plan.contexts and collator.concepts is not None
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NO_MATTER}
    return {
        "settings": dict(plan.settings),
        "layout": plan.layout.to_json(),
        "rows": rows_digest(dataset, plan.columns if rows == [*range(len(dataset))] else _columns(plan)),
        "contexts": collator.contexts_digest() if with_contexts else None,
        "collator": f"{type(collator).__module__}.{type(collator).__qualname__}",
        "config": json_sha256({"config": repr(sorted(config.items()))}),
        "autocast": trainer.accelerator.mixed_precision,
        "matmul": torch.get_float32_matmul_precision(),
        # Private, but where transformers keeps it; tests/methods/test_targets.py fails when it moves.
        "attention": model.config._attn_implementation,
        "device": trainer.args.device.type,
        "versions": {package: version(package) for package in PACKAGES},
    }


def rows_digest(dataset: datasets.Dataset, columns: Sequence[str]) -> str:
    """SHA-256 over columns of a tokenized dataset, in the order of its rows."""
    digest = hashlib.sha256(f"{len(dataset)} {sorted(columns)}".encode())
    for table in dataset.select_columns(sorted(columns)).with_format("arrow").iter(1000):
        for name in table.column_names:
            column = table[name].combine_chunks()
            if not pa.types.is_nested(column.type) or pa.types.is_nested(column.type.value_type):
                digest.update(json.dumps(column.to_pylist()).encode())
                continue
            # As 8 bytes each, whatever type the ids are kept in. The lengths tell where a row ends.
            for values in (column.value_lengths(), column.flatten()):
                digest.update(np.asarray(values, dtype="<i8").tobytes())
    return digest.hexdigest()


def _weights(trainer: ErasureTrainer) -> dict[str, str] | None:
    """What tells the base's weights apart, adapters left out; `None` where this process does not hold them."""
    if any(parameter.is_meta for parameter in trainer.model.parameters()):
        return None
    return base_fingerprint(trainer.model) | {"bits": bit_sums(trainer.model), "dtype": str(trainer.model.dtype)}


def _positions(dataset: Any) -> dict[str, int]:
    """Supervised positions of all rows: all tokens of a text but the first."""
    totals = dict.fromkeys(("forget", "retain"), 0)
    columns = [f"{side}_ids" for side in totals]
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        for side in totals:
            totals[side] += sum(table[f"{side}_ids"].combine_chunks().value_lengths().to_pylist()) - len(table)
    return totals


def _check_seen(store: TargetStore, rank: int, switch: str) -> None:
    """Raise `OSError` unless this process sees the files of all."""
    if absent := store.absent():
        raise OSError(
            f"`targets_dir` {str(store.folder.parent)!r}: {len(absent)} of {store.shards} files of targets are not to be "
            f"seen by process {rank}: name a folder on a drive that all nodes share, or set `{switch}=False`."
        )


def _free(folder: Path) -> int:
    """Free bytes of the disk on which a folder is, or would be made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _make_live(plan: TargetPlan, wanted: bool | None, reason: str, fix: str = "") -> None:
    """Say why there is no store; raise `ValueError` where one was asked for."""
    if wanted:
        raise ValueError(f"`{plan.switch}` is True, but {reason}: {fix}.")
    logger.warning(f"Targets are made in each step, not once before training: {reason}.")


def _everywhere(work: Callable[[], T]) -> list[T]:
    """What all processes make, by rank; what fails in one is raised in all (`RuntimeError`), so that nobody waits for it."""
    made, failure = None, None
    try:
        made = work()
    except Exception as error:
        failure = error
    outcomes = gather_object([(made, failure and f"{type(failure).__name__}: {failure}")])
    if failure is not None:
        raise failure
    if failed := {rank: message for rank, (_, message) in enumerate(outcomes) if message}:
        raise RuntimeError(f"Other processes failed while targets were made: {failed}.")
    return [made for made, _ in outcomes]


class Teacher:
    """A LoRA adapter of this name beside the one that is trained to erase, fine-tuned by next-token prediction and removed after
    use.
    """

    def __init__(self, model: PeftModel, name: str, trained: str):
        self._model, self._name, self._trained = model, name, trained
        self._frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]

    @classmethod
    def fit(cls, trainer: ErasureTrainer, name: str, texts: Sequence[list[int]], steps: int) -> "Teacher":
        """Add the adapter and fine-tune it on tokenized texts, over so many steps in which the learning rate decays to 0.

        The config has `teacher_rank`, `teacher_learning_rate` and `teacher_batch_size`; the global random state is left as it was.
        Raises `ValueError` if the texts are empty (the dataset has no permuted facts).
        """
        texts = [ids for ids in texts if len(ids) > 1]
        args = trainer.args
        if not texts:
            raise ValueError(
                f"`{name}_steps` is {steps}, but the dataset's column for it is empty: only sources that can permute "
                "their facts fill `novice`; set `novice_steps` to 0."
            )
        model = trainer.model
        # With an own seed and a forked state, a resumed run repeats these adapters exactly.
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(args.seed)
            own = name
            while own in model.peft_config:  # an adapter of the user's
                own += "_"
            teacher = cls(model, own, model.active_adapter)
            # Inside a module that the trained adapter saves whole, an adapter would change the names of what is saved.
            whole = "|".join(map(re.escape, model.active_peft_config.modules_to_save or ()))
            model.add_adapter(
                own,
                LoraConfig(
                    r=args.teacher_rank,
                    lora_alpha=args.teacher_rank,
                    target_modules="all-linear",
                    exclude_modules=rf"(.*\.)?({whole})(\..*)?" if whole else None,
                ),
            )
            model.set_adapter(own)
            if args.gradient_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=args.teacher_learning_rate)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            model.train()
            generator = torch.Generator().manual_seed(args.seed)
            order: list[int] = []
            disable = not trainer.accelerator.is_local_main_process
            for _ in tqdm(range(steps), desc=f"Tuning the {name}", disable=disable):
                if len(order) < args.teacher_batch_size:
                    order += torch.randperm(len(texts), generator=generator).tolist()
                chosen, order = order[: args.teacher_batch_size], order[args.teacher_batch_size :]
                batch = trainer.on_device(trainer.data_collator.pad([(texts[index], 0) for index in chosen]))
                with trainer.accelerator.autocast():
                    loss = trainer.forward_positions(model, {name: batch}, {name: nll_reading(batch)})[name].mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            if args.gradient_checkpointing:
                model.activation_checkpointing_disable()  # training enables it in its own way
            teacher._back()
        return teacher

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While this holds, the model, whose adapters the caller has disabled, is the teacher."""
        model = self._model
        model.set_adapter(self._name)
        model.base_model.enable_adapter_layers()
        try:
            yield
        finally:
            model.base_model.disable_adapter_layers()
            self._back()

    def remove(self) -> None:
        """Delete the adapter, so that nothing it learned can be saved."""
        self._model.delete_adapter(self._name)
        self._back()

    def _back(self) -> None:
        """Make the trained adapter the active one again; PEFT makes all of it trainable, what was frozen too."""
        self._model.set_adapter(self._trained)
        for parameter in self._frozen:
            parameter.requires_grad_(False)
