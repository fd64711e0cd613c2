"""One forward over several sub-batches, packed without padding, and what the loss terms read from it; rows to measure on before."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, has_compiled_regions
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from ..data.collator import ElmDataCollator
from ..data.packing import Packing, PackingPlan, PackingRule, find_packing, texts_interact
from ..head import FinalLogits, Plan, ReadHead, Reading, final_logits
from ..modeling import is_partitioned
from ..objectives import kl_divergence, text_mean


logger = logging.get_logger(__name__)
# A layer's matrices take some 24·hidden² operations a token, and attention 4·hidden for each token of its row, but does
# them less well: they cost the same at rows of this many times `hidden` tokens.
ATTENTION = 4
# Which texts a term is about.
SUB_BATCHES = {"erase": "forget", "retain": "retain", "consistency": "synthetic"}


def weighted_batches(inputs: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    """The sub-batch of each term that has a weight: forget text for `erase`, retain text for `retain`, synthetic pairs
    for `consistency`. A batch without pairs lacks the last. Raises `ValueError` if nothing is left.
    """
    batches = {
        term: inputs[SUB_BATCHES[term]] for term, weight in weights.items() if weight and SUB_BATCHES[term] in inputs
    }
    if not batches:
        raise ValueError("`consistency_weight` alone is above 0, but a batch has no synthetic pairs: add some.")
    return batches


def visits(trainer: Any) -> float:
    """Rows that training reads, repetitions counted."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.num_train_epochs * len(trainer.train_dataset)


def place_model(trainer: Any) -> None:
    """Bring the model to its device, which the Trainer itself may do only later, when it begins to train."""
    if next(trainer.model.parameters()).device != trainer.args.device:
        trainer.model.to(trainer.args.device)


def some_rows(trainer: Any, collator: Callable[..., Any], rows: int, size: int) -> Iterator[dict[str, Any]]:
    """Batches of so many training rows, taken evenly from the dataset: the same in all processes of a launch."""
    place_model(trainer)
    dataset = trainer.train_dataset
    rows = min(rows, len(dataset))
    chosen = [row * len(dataset) // rows for row in range(rows)]
    for start in range(0, rows, size):
        yield trainer.on_device(collator([dataset[row] for row in chosen[start : start + size]]))


def check_unsplit(trainer: Any, option: str) -> None:
    """Raise `ValueError` if ZeRO-3 has split the weights, which an option needs whole."""
    if is_partitioned(trainer.model):
        raise ValueError(
            f"`{option}` is {getattr(trainer.args, option)}, but ZeRO-3 has already split the model's weights: set it to 0, "
            "or train with ZeRO-2, DDP or FSDP."
        )


def upcast(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def nll_reading(batch: Mapping[str, torch.Tensor]) -> Reading:
    """Reads the negative log-likelihood of a sub-batch's labels."""
    labels = batch["labels"][batch["rows"], batch["columns"] + 1]
    return lambda logits, where: F.cross_entropy(upcast(logits), labels[where], reduction="none")


def kl_reading(logits: torch.Tensor, where: slice, reference: torch.Tensor) -> torch.Tensor:
    """Reads `KL(reference ‖ adapted)` over the whole vocabulary, where the reference's states are read beside."""
    return kl_divergence(logits, reference)


def supervised_places(batch: Mapping[str, Any]) -> torch.Tensor:
    """Places of a sub-batch's supervised positions in its flattened tokens, `[positions]`."""
    return batch["rows"] * batch["input_ids"].size(1) + batch["columns"]


def context_places(batch: Mapping[str, Any], side: str, contexts: int) -> torch.Tensor:
    """Where the positions of forget text stand behind each of its contexts, `[contexts, positions]`: places in the flattened
    tokens of the expert's or the novice's sub-batch, whose rows follow each other text by text.
    """
    places, rows = supervised_places(batch[side]), batch["rows"]
    counts = torch.bincount(rows, minlength=batch["input_ids"].size(0))
    starts = (counts.cumsum(0) - counts)[rows]
    first = (contexts - 1) * starts + torch.arange(len(rows), device=rows.device)
    return torch.stack([places[first + context * counts[rows]] for context in range(contexts)])


def batch_mean(values: torch.Tensor, batch: Mapping[str, torch.Tensor], rows: int | None = None) -> torch.Tensor:
    """Mean over the texts of a sub-batch of the mean over each text's positions, of `values` `[positions]`.

    With `rows`, that of the whole batch, rows without a text in this sub-batch count as 0. So the mean over micro-batches or
    processes is the same however rows are split among them.
    """
    texts = batch["input_ids"].size(0)
    return text_mean(values, batch["rows"], texts) * (texts / (rows or texts))


def plain_tokens(processing_class: PreTrainedTokenizerBase, vocabulary: int, count: int = 64) -> list[int]:
    """Different token ids from all over the vocabulary, `count` or as many as there are, an even number; none that stands
    for something other than text, such as an image.
    """
    ids = sorted({*processing_class.get_vocab().values()} - {*processing_class.added_tokens_decoder})
    ids = [token for token in ids if token < vocabulary]
    return ids[:: max(len(ids) // count, 1)][: min(count, len(ids) // 2 * 2)]


def run_packed(model: nn.Module, batches: Sequence[Mapping[str, Any]], packing: Packing) -> torch.Tensor:
    """The logits of one forward over sub-batches that are laid into rows as [`PackedForward.pack`] says."""
    # Without a mask, transformers keeps texts whose positions start anew from attending to each other.
    return model(
        input_ids=torch.cat([batch["input_ids"].flatten() for batch in batches])[packing.tokens],
        position_ids=packing.position_ids,
        use_cache=False,
        **packing.attention_arguments(model),
    ).logits


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While this holds, all weights and buffers of a model are in float32, nothing is autocast, and `sdpa` stands for flash
    attention, which has no float32. Afterwards all is as before: casting 16 bits up and down loses nothing.

    Raises `ValueError` if weights are quantized, or lie in shards (FSDP, DeepSpeed ZeRO-3).
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    tensors = [*model.parameters(), *model.buffers()]
    if getattr(base, "is_quantized", False) or is_partitioned(model) or any(isinstance(t, DTensor) for t in tensors):
        raise ValueError(
            '`target_dtype` is "float32", but the weights are quantized or lie in shards, so that they cannot be cast: leave '
            "it out, or with FSDP keep targets (`precompute_targets=True`) and give no `eval_dataset`."
        )
    narrow = [(t, t.dtype) for t in tensors if t.dtype in (torch.float16, torch.bfloat16)]
    attention = base.config._attn_implementation
    flash = "flash" in (attention or "")
    try:
        if flash:
            base.set_attn_implementation("sdpa")
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        with torch.autocast(tensors[0].device.type, enabled=False):
            yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)
        if flash:
            base.set_attn_implementation(attention)


class NonFiniteLossError(FloatingPointError):
    """A loss term became NaN or infinite. The last checkpoint was written before it did."""


class TermTotals:
    """Sums of the values of each loss term since the last log."""

    def __init__(self, device: torch.device):
        self._device = device
        self._totals: dict[str, torch.Tensor] = {}  # sum and number of the values, `[2]` each

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Add the terms of a step."""
        for name, value in terms.items():
            # Tensors: turning them into numbers here would wait for the device at every step. One for all steps: a small
            # block that each step leaves behind would keep a CPU's heap from closing its gaps, so that it grows.
            if name not in self._totals:
                self._totals[name] = torch.zeros(2, device=self._device)
            self._totals[name][0] += value.detach()
            self._totals[name][1] += 1

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each term over steps and processes, all of which must call this."""
        names = sorted(self._totals)
        if accelerator.num_processes > 1:
            # A process whose texts had no part in a term must join in averaging it all the same.
            names = sorted(set(gather_object(names)))
        totals = {name: self._totals.get(name, torch.zeros(2, device=self._device)) for name in names}
        totals = {name: accelerator.reduce(total, reduction="sum") for name, total in totals.items()}
        return {name: (total[0] / total[1]).item() for name, total in totals.items()}

    def clear(self) -> None:
        """Begin anew."""
        self._totals.clear()


class PackedForward:
    """Runs sub-batches through a model in one forward, and reads the head at their supervised positions only.

    What a model does to its head's output, and whether texts in one row see each other, is measured the first time that it
    is needed and then kept. `unwrap` gives the model itself where the Trainer has wrapped it; packed rows are padded to a
    multiple of `pad_to_multiple_of`.
    """

    def __init__(
        self,
        unwrap: Callable[[nn.Module], Any],
        processing_class: PreTrainedTokenizerBase,
        pad_to_multiple_of: int | None = None,
    ):
        self._unwrap_model, self._processing_class = unwrap, processing_class
        # Accelerate asks the environment which libraries are installed each time, which takes milliseconds.
        self._unwrapped: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        self._pad_to_multiple_of = pad_to_multiple_of
        self._final_logits: FinalLogits | None = None
        self._texts_interact: bool | None = None
        # Whether `torch.compile` has parts of it, by model: the wrapped one is another than the one of before.
        self._compiled: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def read(
        self,
        model: nn.Module,
        batches: Mapping[str, Mapping[str, torch.Tensor]],
        readings: Mapping[str, Reading | Plan],
    ) -> dict[str, Any]:
        """Run several sub-batches in one forward, packed without padding, and read the logits of their supervised positions.

        Args:
            model: Model, as the Trainer wrapped it.
            batches: Sub-batches of [`ElmDataCollator`] by name. Without any, nothing is run.
            readings: By name of sub-batch, a function of the logits of a chunk of positions: `reading(logits, where)`
                takes `[chunk, vocab]` and a `slice` of the positions, and gives one number per position, or without
                gradients also a tuple of tensors `[chunk, ...]`. [`STATES`] asks for what enters the head, and a [`Plan`]
                for a reading of more than these logits.

        Returns:
            `dict[str, Any]`: for each sub-batch what its reading gives for all positions, such as `[positions]`; without a
            reading their logits, `[positions, vocab]`.
        """
        if not batches:
            return {}
        parts = list(batches.values())
        packing = self.pack(model, parts)
        supervised, offset = [], 0
        for batch in parts:
            supervised.append(supervised_places(batch) + offset)
            offset += batch["input_ids"].numel()
        wanted = [reading if isinstance(reading, Plan) else Plan(reading) for reading in map(readings.get, batches)]
        plans = [replace(plan, beside=[packing.slots[index] for index in plan.beside]) for plan in wanted]
        if model not in self._compiled:
            self._compiled[model] = has_compiled_regions(model)
        unwrapped = self._unwrap(model)
        reader = ReadHead(
            unwrapped.get_output_embeddings(),
            self.final_logits(model),
            packing.slots[torch.cat(supervised)],
            [len(own) for own in supervised],
            plans,
            unwrapped.config.get_text_config().vocab_size,
            self._compiled[model],
        )
        with reader.reading():
            logits = run_packed(model, parts, packing)
        return dict(zip(batches, reader.results(logits), strict=True))

    def _unwrap(self, model: nn.Module) -> Any:
        if model not in self._unwrapped:
            self._unwrapped[model] = self._unwrap_model(model)
        return self._unwrapped[model]

    def pack(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Packing:
        """How the texts of sub-batches are laid into rows, on their device."""
        packing = find_packing(batches, self.rule(model))
        return packing.to(batches[0]["input_ids"].device, non_blocking=True)

    def rule(self, model: nn.Module) -> PackingRule:
        """What decides how texts are laid into rows for this model."""
        config = self._unwrap(model).config
        return PackingRule(
            left_padded=self._processing_class.padding_side == "left",
            attention=ATTENTION * config.get_text_config().hidden_size,
            one_row="flash" in (config._attn_implementation or ""),
            apart=self.texts_interact(model),
            pad_to_multiple_of=self._pad_to_multiple_of,
        )

    def final_logits(self, model: nn.Module) -> FinalLogits:
        """What the model does to its head's output, measured the first time by a forward over one token."""
        if self._final_logits is None:
            unwrapped = self._unwrap(model)
            vocabulary = unwrapped.config.get_text_config().vocab_size
            self._final_logits = final_logits(model, unwrapped.get_output_embeddings(), vocabulary)
        return self._final_logits

    def texts_interact(self, model: nn.Module) -> bool:
        """Whether texts in one row would see each other, measured the first time by forwards over a few tokens."""
        if self._texts_interact is None:
            unwrapped = self._unwrap(model)
            config = unwrapped.config.get_text_config()
            base = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
            # Chunks of attention are cut by the place in the row, and may be longer than what is measured.
            chunks = getattr(config, "attention_chunk_size", None) is not None
            # What a model says of itself is believed in any precision.
            self._texts_interact = chunks or getattr(base, "_is_stateful", False)
            if not self._texts_interact:
                tokens = plain_tokens(self._processing_class, config.vocab_size)
                half = len(tokens) // 2
                self._texts_interact = texts_interact(model, tokens[:half], tokens[half:])
            if self._texts_interact:
                logger.warning(
                    f"In a {type(base).__name__}, texts that share a row see each other: each gets a row of its own, which "
                    "takes longer where texts differ in length."
                )
        return self._texts_interact


class PackInCollator(TrainerCallback):
    """Has the collator pack what shares a forward, in the workers that load the batches.

    Args:
        trainer: Trainer of the package; only once it begins to train is its model where it can be measured.
        collator: Collator that it was given; another than [`ElmDataCollator`] is left alone, and the step packs its batches.
        rule: Measures the model, and gives the [`PackingRule`].
    """

    def __init__(self, trainer: Any, collator: Any, rule: Callable[[], PackingRule]):
        self._trainer, self._collator, self._rule = trainer, collator, rule

    def on_train_begin(self, args, state, control, **kwargs):
        if isinstance(self._collator, ElmDataCollator):
            with self._trainer.compute_loss_context_manager():
                rule = self._rule()
            self._collator.packing = PackingPlan(rule, [*dict.fromkeys(self._trainer.packed_together())])
