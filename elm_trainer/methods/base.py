"""`ErasureTrainer`: what the erasure methods share over TRL's `SFTTrainer`."""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging
from trl import SFTConfig, SFTTrainer

from ..data.collator import ElmDataCollator, Packing, align, pack_batches, texts_interact
from ..data.target_store import RowTargets
from ..data.tokens import text_ids, tokenize_pair
from ..distributed import align_checkpointing, check_saving, on_first, trained_weights
from ..files import UNFINISHED, discard, read_object, sync, write_json
from ..modeling import adapter_disabled, evaluating, is_partitioned, keep_differentiable, no_graph_below, reentrant
from ..ops import STATES, FinalLogits, ReadHead, Reading, final_logits, kl_divergence, text_mean
from ..ops.head import Plan
from ..run_lock import only_run_in
from .checkpointing import (
    Launch,
    check_launch,
    check_whole,
    checkpoints,
    last_finished,
    last_whole,
    mark_finished,
    rotate,
    set_aside,
    settle,
)
from .targets import TargetPlan, precompute_targets
from .validation import (
    check_adapter,
    check_adapter_fits,
    check_columns,
    check_options,
    check_reference,
    check_tokenizer,
    few_logits,
    load_given,
    named_datasets,
    text_limit,
    warn_of_loading,
)


if TYPE_CHECKING:
    from ..hub.commit import Publication

logger = logging.get_logger(__name__)
RUN_FILE = "erasure_run.json"
# A layer's matrices take some 24·hidden² operations a token, and attention 4·hidden for each token of its row, but does
# them less well: they cost the same at rows of this many times `hidden` tokens.
ATTENTION = 4
# Settings of a method that say where its targets are made, which changes none of them.
PLACES = ("precompute_targets", "precompute_ref_log_probs", "targets_dir")


# Settings of the `Trainer` that a resumed run takes from its checkpoint.
KEPT = (
    "learning_rate", "lr_scheduler_type", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed",
    "data_seed",
)  # fmt: skip


class NonFiniteLossError(FloatingPointError):
    """A loss term became NaN or infinite. The last checkpoint was written before it did."""


@dataclass
class ErasureConfig(SFTConfig):
    """[`~trl.SFTConfig`] as the methods' configs extend it: on a machine whose accelerator cannot compute in bfloat16, or
    without one, `bf16` defaults to `False`, where TRL's default of `True` is an error.
    """

    def __post_init__(self):
        if self.bf16 is None and not (
            self.fp16 or self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
        ):
            logger.warning("`bf16` is left out, and no accelerator here computes in bfloat16: training in float32.")
            self.bf16 = False
        # TRL sets its default by the older name, of which transformers would warn.
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}") is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        super().__post_init__()


class ErasureTrainer(SFTTrainer):
    """TRL's `SFTTrainer` on erasure data: sub-batches, a frozen reference in the same weights, one forward, logged terms.

    Subclasses name their config in `_config_class` and override `compute_loss`. The arguments are those of
    [`~trl.SFTTrainer`]; the dataset has the columns of [`build_erasure_dataset`], and the model is trained through an
    adapter, since the reference is the same model with the adapter disabled. A method that can train the weights
    themselves sets `_needs_adapter` to `False` and overrides `reference` for that case; an adapter that is given is
    checked all the same.

    A model given as a string is loaded as [`~trl.SFTTrainer`] does, and then checked as any other. Without
    `processing_class` the model's own tokenizer is loaded.

    Raises:
        TypeError: if `args` is not the method's own config.
        ValueError: if there is no tokenizer or it does not fit, there is no adapter and no `peft_config`, the adapter
            is frozen, names layers or modules the model lacks, or leaves no untouched reference ([`check_reference`]),
            a dataset is empty, lacks a column or truncates to nothing, or an option is given that an erasure cannot
            follow (`REFUSED_OPTIONS`).
    """

    _tag_names = ["trl", "elm-trainer"]
    _config_class: type[SFTConfig] = SFTConfig
    _needs_adapter = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        args = self.own_config(args)
        # Sum and number of the values of each loss term since the last log, `[2]` each.
        self._totals: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        if args.push_to_hub and args.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"`hub_strategy` is {args.hub_strategy.value!r}, which uploads checkpoints as they are, without report "
                "and checks: use 'end', and `push_to_hub()` after the evaluation."
            )
        check_options(args, kwargs)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_columns(name, dataset)
        model, processing_class = load_given(model, args, processing_class, kwargs.pop("quantization_config", None))
        with_adapter = self._needs_adapter or peft_config is not None or isinstance(model, PeftModel)
        if with_adapter:
            check_adapter(model, peft_config)
        if processing_class.pad_token is None:
            # Padding is masked, so any token will do where there is no end token either.
            pad = processing_class.eos_token or processing_class.convert_ids_to_tokens(0)
            processing_class.pad_token = pad
            logger.warning(f"The tokenizer has no pad token; `pad_token` is set to {pad!r}.")
        check_tokenizer(model, processing_class)
        if data_collator is None:
            data_collator = ElmDataCollator(
                processing_class, pad_to_multiple_of=args.pad_to_multiple_of, seed=args.seed
            )
        keep_differentiable(model)
        context = data_collator.longest_context() if isinstance(data_collator, ElmDataCollator) else 0
        self._text_limit = text_limit(model, args.max_length, context)
        tokens = plain_tokens(processing_class, model.config.get_text_config().vocab_size, 16)
        # Weights that lie in shards, or have no content yet, cannot be run here.
        runs = not is_partitioned(model) and not any(parameter.is_meta for parameter in model.parameters())
        base = few_logits(model, tokens) if runs and with_adapter and not isinstance(model, PeftModel) else None
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        if self.args.prediction_loss_only is not True:
            # The step makes logits of supervised positions only, so there are none to hand to `compute_metrics`.
            self.args.prediction_loss_only = True
        if isinstance(self.model, PeftModel):
            check_adapter_fits(self.model)
            warn_of_loading(self.model)
            if runs:
                check_reference(self.model, tokens, base)

    @classmethod
    def own_config(cls, args: SFTConfig | None) -> SFTConfig:
        """The method's config: `args`, or its defaults where there is none.

        Raises:
            TypeError: if `args` is another method's config.
        """
        if args is None:
            return cls._config_class(f"{cls._name.lower()}-output")
        if not isinstance(args, cls._config_class):
            raise TypeError(
                f"`args` is of type {type(args).__name__}: {cls.__name__} takes its own {cls._config_class.__name__}."
            )
        return args

    # `_prepare_dataset` and `_set_signature_columns_if_needed` are private to TRL and transformers, but the only places
    # where tokenisation can be replaced before `Trainer.__init__`. tests/methods/test_base.py fails when they move.
    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if "forget_ids" in dataset.column_names:
            return dataset
        limit, sides = self._text_limit, ("forget", "retain", "synthetic")

        def tokenize(example: Mapping[str, Any], row: int) -> dict[str, Any]:
            tokens: dict[str, Any] = {"row": row, "concept": example["concept"]}
            tokens["forget_ids"] = text_ids(processing_class, example["forget"])
            if given := example.get("retain_prompt"):
                text = example["retain"].removeprefix(given)
                tokens["retain_ids"], tokens["retain_start"] = tokenize_pair(processing_class, given, text)
            else:
                tokens |= {"retain_ids": text_ids(processing_class, example["retain"]), "retain_start": 0}
            tokens["novice_ids"] = text_ids(processing_class, example.get("novice") or "")
            novices = [text_ids(processing_class, text)[:limit] for text in example.get("novices") or []]
            tokens |= {"novices_ids": novices, "aligned": align(tokens["forget_ids"][:limit], novices)}
            if example["completion"]:
                pair, start = tokenize_pair(processing_class, example["prompt"], example["completion"])
                tokens |= {"synthetic_ids": pair, "completion_start": start}
            else:
                tokens |= {"synthetic_ids": [], "completion_start": 0}
            starts = {"retain": tokens["retain_start"], "synthetic": tokens["completion_start"]}
            kept = {f"{name}_ids": tokens[f"{name}_ids"][:limit] for name in (*sides, "novice")}
            left = {name: len(kept[f"{name}_ids"]) - max(starts.get(name, 0), 1) for name in sides}
            too_long = [len(kept[f"{name}_ids"]) < len(tokens[f"{name}_ids"]) for name in sides]
            usable = min(left["forget"], left["retain"]) > 0 and (left["synthetic"] > 0 or not tokens["synthetic_ids"])
            return tokens | kept | {"too_long": too_long, "usable": usable}

        # Names of the texts are kept apart from their tokens, which alone stay in the dataset.
        dataset = dataset.map(
            tokenize,
            with_indices=True,
            remove_columns=dataset.column_names,
            num_proc=args.dataset_num_proc,
            desc=f"Tokenizing {dataset_name} dataset",
        )

        truncated = {name: sum(flags[index] for flags in dataset["too_long"]) for index, name in enumerate(sides)}
        usable = dataset.select([row for row, usable in enumerate(dataset["usable"]) if usable])
        dropped = len(dataset) - len(usable)
        if any(truncated.values()) or dropped:
            logger.warning(
                f"The {dataset_name} dataset: cut to `max_length={limit}` tokens: {truncated}; dropped {dropped} of "
                f"{len(dataset)} rows that hold nothing to learn after that."
            )
        if not len(usable):
            raise ValueError(
                f"`max_length` is {limit}, at which every text of the {dataset_name} dataset truncates to nothing: "
                "raise it, or give texts of two tokens and more."
            )
        dataset = usable.remove_columns(["too_long", "usable"])
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if args.train_sampling_strategy == "group_by_length":
            # What the sampler of transformers groups by.
            lengths = [sum(map(len, texts)) for texts in zip(*(dataset[f"{name}_ids"] for name in sides), strict=True)]
            dataset = dataset.add_column(args.length_column_name, lengths)
        return dataset.remove_columns("row").add_column("row", list(range(len(dataset))))

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [
                "row", "concept", "forget_ids", "retain_ids", "retain_start", "novice_ids", "novices_ids", "aligned",
                "synthetic_ids", "completion_start", self.args.length_column_name,
            ]  # fmt: skip

    def forward_positions(
        self,
        model: nn.Module,
        batches: Mapping[str, Mapping[str, torch.Tensor]],
        readings: Mapping[str, Reading] | None = None,
        further: Mapping[str, Sequence[torch.Tensor]] | None = None,
        beside: Mapping[str, torch.Tensor] | None = None,
        states: Collection[str] = (),
    ) -> dict[str, Any]:
        """Run several sub-batches in one forward, packed without padding, and read the logits of their supervised positions.

        Args:
            model (`nn.Module`): Model, as the Trainer wrapped it.
            batches (`Mapping`): Sub-batches of [`ElmDataCollator`] by name. Without any, nothing is run.
            readings (`Mapping[str, Reading]`, *optional*): By name of sub-batch, a function of the logits of a chunk of
                positions: `reading(logits, where)` takes `[chunk, vocab]` and a `slice` of the positions, and gives one
                number per position, or without gradients also a tuple of tensors `[chunk, ...]`. [`STATES`] asks for
                what enters the head.
            further (`Mapping[str, Sequence[torch.Tensor]]`, *optional*): By name of sub-batch, states `[positions, hidden]`
                of other forwards at the same positions, whose logits the reading takes after `where`.
            beside (`Mapping[str, torch.Tensor]`, *optional*): By name of sub-batch, other positions of the same forward
                whose logits the reading takes after those, `[others, positions]`: indices into the flattened tokens of
                all sub-batches, one after the other.
            states (`Collection[str]`, *optional*): Names of sub-batches whose reading gives a tuple, to which what enters
                the head is added, `[positions, hidden]`.

        Returns:
            `dict[str, Any]`: for each sub-batch what its reading gives for all positions, such as `[positions]`. Without a
            reading it is the logits `[positions, vocab]`, which a step cannot afford for large vocabularies.
        """
        if not batches:
            return {}
        readings, further, beside = readings or {}, further or {}, beside or {}
        parts = list(batches.values())
        tokens, position_ids, slots = self.pack(model, parts)
        supervised, offset = [], 0
        for batch in parts:
            supervised.append(batch["rows"] * batch["input_ids"].size(1) + batch["columns"] + offset)
            offset += batch["input_ids"].numel()
        unwrapped = self.accelerator.unwrap_model(model)
        head = unwrapped.get_output_embeddings()
        vocabulary = unwrapped.config.get_text_config().vocab_size
        plans = [
            Plan(
                len(places),
                readings.get(name),
                further.get(name, ()),
                [slots[index] for index in beside.get(name, ())],
                name in states,
            )
            for name, places in zip(batches, supervised, strict=True)
        ]
        reader = ReadHead(head, self.final_logits(model), slots[torch.cat(supervised)], plans, vocabulary)
        # Without a mask, transformers keeps texts whose positions start anew from attending to each other.
        with reader.reading():
            logits = model(
                input_ids=torch.cat([batch["input_ids"].flatten() for batch in parts])[tokens],
                position_ids=position_ids,
                use_cache=False,
            ).logits
        return dict(zip(batches, reader.results(logits), strict=True))

    def final_logits(self, model: nn.Module) -> FinalLogits:
        """What the model does to its head's output, measured the first time by a forward over one token."""
        if self._final_logits is None:
            unwrapped = self.accelerator.unwrap_model(model)
            vocabulary = unwrapped.config.get_text_config().vocab_size
            self._final_logits = final_logits(model, unwrapped.get_output_embeddings(), vocabulary)
        return self._final_logits

    def texts_interact(self, model: nn.Module) -> bool:
        """Whether texts in one row would see each other, measured the first time by forwards over a few tokens."""
        if self._texts_interact is None:
            unwrapped = self.accelerator.unwrap_model(model)
            config = unwrapped.config.get_text_config()
            base = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
            # Chunks of attention are cut by the place in the row, and may be longer than what is measured.
            chunks = getattr(config, "attention_chunk_size", None) is not None
            # What a model says of itself is believed in any precision.
            self._texts_interact = chunks or getattr(base, "_is_stateful", False)
            if not self._texts_interact:
                tokens = plain_tokens(self.processing_class, config.vocab_size)
                half = len(tokens) // 2
                self._texts_interact = texts_interact(model, tokens[:half], tokens[half:])
            if self._texts_interact:
                logger.warning(
                    f"In a {type(base).__name__}, texts that share a row see each other: each gets a row of its own, which "
                    "takes longer where texts differ in length."
                )
        return self._texts_interact

    _final_logits: FinalLogits | None = None
    _texts_interact: bool | None = None

    def position_losses(
        self, model: nn.Module, batches: Mapping[str, Mapping[str, Any]], retain_loss: str = "nll"
    ) -> dict[str, torch.Tensor]:
        """Negative log-likelihood of every label, `[positions]` for each sub-batch, in one forward.

        Args:
            model (`nn.Module`): Model, as the Trainer wrapped it.
            batches (`Mapping`): Sub-batches of the collator by the name of their term.
            retain_loss (`str`, *optional*, defaults to `"nll"`): `"kl"` gives `KL(reference ‖ adapted)` for the term
                `retain` instead (both as in TOFU, arXiv 2401.06121, section 3.3).
        """
        readings = {name: nll_reading(batch) for name, batch in batches.items()}
        further = {}
        if retain_loss == "kl" and "retain" in batches:
            retain = {"retain": batches["retain"]}
            further["retain"] = [self.reference_positions(model, retain, {"retain": STATES})["retain"]]
            readings["retain"] = kl_reading
        return self.forward_positions(model, batches, readings, further)

    def pack(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Packing:
        """How `forward_positions` lays the texts of sub-batches into rows, on their device."""
        unwrapped = self.accelerator.unwrap_model(model)
        packing = pack_batches(
            batches,
            left_padded=self.processing_class.padding_side == "left",
            attention=ATTENTION * unwrapped.config.get_text_config().hidden_size,
            one_row="flash" in (unwrapped.config._attn_implementation or ""),
            apart=self.texts_interact(model),
            pad_to_multiple_of=self.args.pad_to_multiple_of,
        )
        device = batches[0]["input_ids"].device
        return Packing(*(part if part is None else part.to(device, non_blocking=True) for part in packing))

    @contextmanager
    def reference(self, model: nn.Module):
        """The frozen reference: the same weights with the adapter disabled, without dropout and gradients."""
        unwrapped = self.accelerator.unwrap_model(model)
        with evaluating(unwrapped), torch.no_grad(), adapter_disabled(unwrapped):
            yield

    def reference_positions(
        self,
        model: nn.Module,
        batches: Mapping[str, Mapping[str, torch.Tensor]],
        readings: Mapping[str, Reading] | None = None,
    ) -> dict[str, Any]:
        """The same as `forward_positions`, for the frozen reference."""
        with self.reference(model):
            return self.forward_positions(model, batches, readings)

    def precompute(self, plan: TargetPlan) -> RowTargets | None:
        """Run a function of frozen weights over all training rows once, or take from disk what an earlier run made.

        Args:
            plan ([`TargetPlan`]): What is made of each row, and all that it depends on.

        Returns:
            [`RowTargets`]: what was made for each row, such as [`ElmDataCollator`] takes as `targets`; `None` where the
            step is to make it itself. Raises what [`precompute_targets`] raises.
        """
        return precompute_targets(self, plan)

    def get_eval_dataloader(self, eval_dataset=None):
        with self._without_targets():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._without_targets():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _without_targets(self):
        # What is stored belongs to training rows. For others it is made in the step.
        collator = self.data_collator
        if isinstance(collator, ElmDataCollator):
            self.data_collator = replace(collator, targets=None)
        try:
            yield
        finally:
            self.data_collator = collator

    # Private to transformers, which looks for `input_ids` at the top of a batch. tests/methods/test_options.py fails when it
    # moves.
    def _track_num_input_tokens(self, inputs):
        parts = [batch for batch in inputs.values() if isinstance(batch, Mapping) and "input_ids" in batch]
        super()._track_num_input_tokens(
            {name: torch.cat([batch[name].flatten() for batch in parts]) for name in ("input_ids", "attention_mask")}
        )

    def weigh(self, terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
        """Weighted sum of the loss terms, each logged under its name as `<name>_loss`."""
        totals = self._totals["train" if self.model.training else "eval"]
        for name, value in terms.items():
            # Tensors: turning them into numbers here would wait for the device at every step. One for all steps: a small
            # block that each step leaves behind would keep a CPU's heap from closing its gaps, so that it grows.
            if name not in totals:
                totals[name] = torch.zeros(2, device=self.args.device)
            totals[name][0] += value.detach()
            totals[name][1] += 1
        return sum((weights[name] * value for name, value in terms.items()), torch.zeros((), device=self.args.device))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def floating_point_ops(self, inputs):
        tokens = sum(batch["input_ids"].numel() for batch in inputs.values())
        return 6 * tokens * self._parameter_count

    @property
    def _parameter_count(self) -> int:
        if not hasattr(self, "_counted_parameters"):
            self._counted_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return self._counted_parameters

    def log(self, logs, start_time=None):
        if self.model.training:
            self._metrics["train"].update(self._mean_terms("train"))
            self._totals["train"].clear()
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        # The terms go where the loss goes, so that each of several datasets has its own, in the log and among the metrics
        # that choose the best checkpoint.
        self._totals["eval"].clear()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        for name, [mean] in self._mean_terms("eval").items():
            output.metrics[f"{metric_key_prefix}_{name}"] = mean
        return output

    def _mean_terms(self, mode: str) -> dict[str, list[float]]:
        totals = self._totals[mode]
        names = sorted(totals)
        # A process whose texts had no part in a term must join in averaging it all the same.
        names = sorted(set(gather_object(names))) if self.accelerator.num_processes > 1 else names
        means = {}
        for name in names:
            total = totals.get(name, torch.zeros(2, device=self.args.device))
            total = self.accelerator.reduce(total, reduction="sum")
            mean = (total[0] / total[1]).item()
            if not math.isfinite(mean):
                kept = last_finished(checkpoints(self.args.output_dir))
                raise NonFiniteLossError(
                    f"`{name}_loss` became {mean} by step {self.state.global_step}: lower `learning_rate` or the term's "
                    f"weight, or train in float32. Last good checkpoint: {kept or 'none yet'}."
                )
            means[f"{name}_loss"] = [mean]
        return means

    def train(self, resume_from_checkpoint=None, **kwargs):
        check_saving(self)
        align_checkpointing(self)
        if self.accelerator.num_processes > 1:
            # Those that computed no targets have not measured the model yet, and all must do so in the same forward.
            self._final_logits = self._texts_interact = None
        with only_run_in(self.args.output_dir):
            checkpoint = on_first(lambda: self._begin_run(resume_from_checkpoint))
            with nullcontext() if reentrant(self.args) else no_graph_below(self.model):
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _begin_run(self, resume_from_checkpoint: str | Path | bool | None) -> str | None:
        """The checkpoint to go on from, after all that a run in this folder must keep to was checked."""
        output_dir = Path(self.args.output_dir)
        settle(output_dir)
        found = checkpoints(output_dir)
        if found and not resume_from_checkpoint:
            raise ValueError(
                f"`output_dir` is {str(output_dir)!r}, which holds the checkpoints of another run ({found[-1]}): resume "
                "it with `resume_from_checkpoint=True`, or name another folder."
            )
        checkpoint = None
        if resume_from_checkpoint is True:
            checkpoint = last_whole(found)
            if checkpoint is None:
                logger.warning(
                    f"`resume_from_checkpoint` is True, but {output_dir} holds no finished checkpoint: starting afresh."
                )
        elif resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            check_whole(checkpoint)
        run_file, fingerprint = output_dir / RUN_FILE, self._run_fingerprint()
        if checkpoint is not None and run_file.exists():
            try:
                saved = read_object(run_file)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{run_file}, which holds the settings of the run to be resumed, cannot be read ({error}): delete it to "
                    "resume without comparing them with those of this run."
                ) from error
            if changed := sorted(key for key in fingerprint if saved.get(key, fingerprint[key]) != fingerprint[key]):
                raise ValueError(
                    f"`output_dir` {str(output_dir)!r} holds a run with other settings ({', '.join(changed)} changed): "
                    "restore them to resume, or name another folder."
                )
        if checkpoint is not None:
            check_launch(checkpoint, Launch.of(self))
        write_json(run_file, fingerprint)
        return None if checkpoint is None else str(checkpoint)

    def _run_fingerprint(self) -> dict[str, str]:
        """What must not change between a run and its resumption: the data, the settings of the method, and those that the
        checkpoint's optimizer, schedule and order of rows would keep all the same.
        """
        digest = hashlib.sha256()
        for column in ("forget_ids", "retain_ids", "synthetic_ids"):
            for ids in self.train_dataset[column]:
                digest.update(json.dumps(ids).encode())
        own = set(type(self.args).__dataclass_fields__) - set(SFTConfig.__dataclass_fields__) - set(PLACES) | set(KEPT)
        settings = {name: repr(getattr(self.args, name)) for name in sorted(own)}
        return settings | {"train_dataset": digest.hexdigest(), "method": type(self).__name__}

    def push_to_hub(
        self,
        commit_message: str = "Publish the erased adapter",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> "Publication | None":
        """Publish the adapter with its report, as [`publish_adapter`] does.

        The repository is `hub_model_id`, else the name of `output_dir`; it is made private unless `private` or
        `hub_private_repo` says otherwise. The adapter is saved to `output_dir/adapter`, the reports are read from
        `report.json` and, if there is one, `attacks.json` in `output_dir`.

        Args:
            commit_message (`str`, *optional*): First line of the commit's message.
            blocking (`bool`, *optional*, defaults to `True`): Must be `True`: what is published is checked first.
            token (`str`, *optional*): Token; `hub_token`, else that of the environment, by default.
            revision (`str`, *optional*): Branch; `hub_revision`, else `main`, by default.
            private (`bool`, *optional*): See [`publish_adapter`].
            options: Any other argument of [`publish_adapter`], such as `report`, `base_model` or `dry_run`.

        Returns:
            [`Publication`], or `None` on processes other than the first.

        Raises:
            ValueError: without a report, and for what [`publish_adapter`] refuses.
        """
        # The one import upwards: publishing knows reports, not trainers, but users of TRL look for it here.
        from ..hub.publish import publish_adapter

        if not blocking:
            raise ValueError("`blocking` is False, but publishing has checks to fail: leave it out.")
        output = Path(self.args.output_dir)
        report, attacks = (options.pop(name, output / f"{name}.json") for name in ("report", "attacks"))
        if isinstance(report, Path) and not report.exists():
            raise ValueError(
                f"`report` is left out, and there is no {report}: an adapter is published with its evidence. Measure it "
                f"with `evaluate_erasure(..., output_dir={str(output)!r})` first."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(str(output / "adapter"))
        if not self.is_world_process_zero():
            return None
        return publish_adapter(
            output / "adapter",
            self.args.hub_model_id or output.resolve().name,
            report=report,
            attacks=None if isinstance(attacks, Path) and not attacks.exists() else attacks,
            model=self.accelerator.unwrap_model(self.model),
            processing_class=self.processing_class,
            method=type(self).__name__,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            api=HfApi(token=token or self.args.hub_token),
            **options,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # Trainer would make a repository, public by default, before there is anything to publish.
        pass

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call or not self.args.should_save:
            self._write_model(folder)
            return
        # What is there already stays as it was until all of the new files are whole.
        staged = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_model(staged)
            files = [path for path in staged.rglob("*") if path.is_file()]
            for path in files:
                sync(path)
            for path in files:
                place = folder / path.relative_to(staged)
                place.parent.mkdir(exist_ok=True)
                os.replace(path, place)
            sync(folder)
        except Exception as error:
            raise OSError(
                f"The model could not be saved to {str(folder)!r} ({error}): free some space, or name a folder that can be "
                "written to. Earlier files are as they were."
            ) from error
        finally:
            discard(staged)

    def _write_model(self, folder: Path) -> None:
        """Write the adapter, or the weights where they are trained themselves, into a folder."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        for config in unwrapped.peft_config.values() if isinstance(unwrapped, PeftModel) else ():
            # Where it is not told, PEFT saves the name of a class to import, which `load_erased` does for nobody.
            config.task_type = config.task_type or TaskType.CAUSAL_LM
        if self.is_fsdp_enabled:
            # Trainer would gather the whole model. `_save` is private to it; tests/distributed fails when it moves.
            self._save(str(folder), state_dict=trained_weights(self.model))
        else:
            # With `push_to_hub`, Trainer would push here, before there is any evidence.
            super().save_model(str(folder), _internal_call=True)
        # PEFT writes a card of gaps to be filled in and the base's path on this machine; `publish_adapter` makes a true one.
        if self.args.should_save:
            (folder / "README.md").unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial):
        # Nothing is saved after a loss that was not finite, even between two logs.
        self._mean_terms("train")
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        limit = self.args.save_total_limit
        try:
            if self.args.should_save:
                set_aside(folder)
            self.accelerator.wait_for_everyone()
            # Older checkpoints go only when this one is finished, which is when every process has written its part.
            self.args.save_total_limit = None
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_finished(folder, Launch.of(self))
        # Also what the libraries call a full disk: `RuntimeError`, `SafetensorError`, and tokenizers `Exception`.
        except Exception as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
                settle(folder.parent)
            kept = last_finished(checkpoints(self.args.output_dir))
            raise OSError(
                f"`output_dir` {self.args.output_dir!r}: checkpoint {folder.name} could not be written ({error}): free "
                "some space, or see why another process ended, and resume. The unfinished checkpoint was removed; last "
                f"good one: {kept or 'none yet'}."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            settle(folder.parent)
            rotate(folder, limit, self.state.best_model_checkpoint)


def plain_tokens(processing_class: PreTrainedTokenizerBase, vocabulary: int, count: int = 64) -> list[int]:
    """Different token ids from all over the vocabulary, `count` or as many as there are, an even number; none that stands
    for something other than text, such as an image.
    """
    ids = sorted({*processing_class.get_vocab().values()} - {*processing_class.added_tokens_decoder})
    ids = [token for token in ids if token < vocabulary]
    return ids[:: max(len(ids) // count, 1)][: min(count, len(ids) // 2 * 2)]


# Which texts a term is about.
SUB_BATCHES = {"erase": "forget", "retain": "retain", "consistency": "synthetic"}


def weighted_batches(inputs: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    """The sub-batch of each term that has a weight: forget text for `erase`, retain text for `retain`, synthetic pairs
    for `consistency`. A batch without pairs lacks the last.

    Raises:
        ValueError: if nothing is left.
    """
    batches = {
        term: inputs[SUB_BATCHES[term]] for term, weight in weights.items() if weight and SUB_BATCHES[term] in inputs
    }
    if not batches:
        raise ValueError("`consistency_weight` alone is above 0, but a batch has no synthetic pairs: add some.")
    return batches


def nll_reading(batch: Mapping[str, torch.Tensor]) -> Reading:
    """Reads the negative log-likelihood of a sub-batch's labels."""
    labels = batch["labels"][batch["rows"], batch["columns"] + 1]
    return lambda logits, where: F.cross_entropy(logits.float(), labels[where], reduction="none")


def kl_reading(logits: torch.Tensor, where: slice, reference: torch.Tensor) -> torch.Tensor:
    """Reads `KL(reference ‖ adapted)` over the whole vocabulary, where the reference's states are read beside."""
    return kl_divergence(logits, reference)


def batch_mean(values: torch.Tensor, batch: Mapping[str, torch.Tensor], rows: int | None = None) -> torch.Tensor:
    """Mean over the texts of a sub-batch of the mean over each text's positions, of `values` `[positions]`.

    With `rows`, that of the whole batch, rows without a text in this sub-batch count as 0. So the mean over micro-batches or
    processes is the same however rows are split among them.
    """
    texts = batch["input_ids"].size(0)
    return text_mean(values, batch["rows"], texts) * (texts / (rows or texts))
