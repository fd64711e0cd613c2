"""`ErasureTrainer`: what the erasure methods share over TRL's `SFTTrainer`."""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from ..data.collator import tokenize_pair
from ..data.packing import pack_batches
from ..ops import KeepPositions


logger = logging.get_logger(__name__)
COLUMNS = ("concept", "forget", "retain", "prompt", "completion")
RUN_FILE = "erasure_run.json"


class NonFiniteLossError(FloatingPointError):
    """A loss term became NaN or infinite. The last checkpoint was written before it did."""


class ErasureTrainer(SFTTrainer):
    """TRL's `SFTTrainer` on erasure data: sub-batches, a frozen reference in the same weights, one forward, logged terms.

    Subclasses override `compute_loss`. The arguments are those of [`~trl.SFTTrainer`]; the dataset has the columns of
    [`build_erasure_dataset`], and the model is trained through an adapter, since the reference is the same model with
    the adapter disabled.

    Raises:
        ValueError: if there is no adapter and no `peft_config`, the adapter is frozen or names layers or modules the
            model lacks, a dataset is empty, lacks a column or truncates to nothing, or the tokenizer does not fit.
    """

    _tag_names = ["trl", "elm-trainer"]

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
        for name, dataset in [*_named("train_dataset", train_dataset), *_named("eval_dataset", eval_dataset)]:
            check_columns(name, dataset)
        check_adapter(model, peft_config)
        if processing_class is not None:
            if processing_class.pad_token is None:
                processing_class.pad_token = processing_class.eos_token
                logger.warning(
                    f"The tokenizer has no pad token; `pad_token` is set to {processing_class.eos_token!r}."
                )
            if not isinstance(model, str):
                check_tokenizer(model, processing_class)
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

    # `_prepare_dataset` and `_set_signature_columns_if_needed` are private to TRL and transformers, but the only places
    # where tokenisation can be replaced before `Trainer.__init__`. tests/methods/test_base.py fails when they move.
    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if "forget_ids" in dataset.column_names:
            return dataset
        limit = args.max_length
        truncated = dict.fromkeys(("forget", "retain", "completion"), 0)

        def tokenize(example: Mapping[str, Any], row: int) -> dict[str, Any]:
            tokens: dict[str, Any] = {"row": row, "concept": example["concept"]}
            for name in ("forget", "retain"):
                tokens[f"{name}_ids"] = processing_class(example[name])["input_ids"]
            tokens["novice_ids"] = processing_class(example.get("novice") or "")["input_ids"]
            if example["completion"]:
                pair, start = tokenize_pair(processing_class, example["prompt"], example["completion"])
                tokens |= {"synthetic_ids": pair, "completion_start": start}
            else:
                tokens |= {"synthetic_ids": [], "completion_start": 0}
            return tokens

        # Names of the texts are kept apart from their tokens, which alone stay in the dataset.
        dataset = dataset.map(
            tokenize,
            with_indices=True,
            remove_columns=dataset.column_names,
            num_proc=args.dataset_num_proc,
            desc=f"Tokenizing {dataset_name} dataset",
        )

        def measure(example: Mapping[str, Any]) -> dict[str, Any]:
            return {
                "too_long": [len(example[f"{name}_ids"]) > limit for name in ("forget", "retain", "synthetic")],
                "usable": all(len(example[f"{name}_ids"]) > 1 for name in ("forget", "retain"))
                and (not example["synthetic_ids"] or example["completion_start"] < limit),
            }

        if limit is not None:
            dataset = dataset.map(measure)
            truncated = {
                name: sum(flags[index] for flags in dataset["too_long"])
                for index, name in enumerate(("forget", "retain", "synthetic"))
            }
            usable = dataset.filter(lambda example: example["usable"])
            dropped = len(dataset) - len(usable)
            if any(truncated.values()) or dropped:
                logger.warning(
                    f"The {dataset_name} dataset: cut to `max_length={limit}` tokens: {truncated}; dropped {dropped} of "
                    f"{len(dataset)} rows that hold nothing to learn after that."
                )
            if not len(usable) or limit < 2:
                raise ValueError(
                    f"`max_length` is {limit}, at which every text of the {dataset_name} dataset truncates to nothing: "
                    "raise it."
                )
            dataset = usable.remove_columns(["too_long", "usable"]).map(
                lambda example: {
                    f"{name}_ids": example[f"{name}_ids"][:limit]
                    for name in ("forget", "retain", "novice", "synthetic")
                }
            )
        return dataset.map(lambda _, row: {"row": row}, with_indices=True)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [
                "row", "concept", "forget_ids", "retain_ids", "novice_ids", "synthetic_ids", "completion_start"
            ]  # fmt: skip

    def forward_positions(
        self, model: nn.Module, batches: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Run several sub-batches in one forward, packed without padding, and return the logits of their supervised positions.

        Args:
            model (`nn.Module`): Model, as the Trainer wrapped it.
            batches (`Mapping`): Sub-batches of [`ElmDataCollator`] by name.

        Returns:
            `dict[str, torch.Tensor]`: logits `[positions, vocab]` for each sub-batch.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        parts = list(batches.values())
        packing = pack_batches(
            parts,
            left_padded=self.processing_class.padding_side == "left",
            one_row="flash" in (unwrapped.config._attn_implementation or ""),
            apart=getattr(unwrapped.get_base_model(), "_is_stateful", False),
        )
        device = parts[0]["input_ids"].device
        tokens, position_ids, slots = (part.to(device, non_blocking=True) for part in packing)
        supervised, offset = [], 0
        for batch in parts:
            supervised.append(batch["rows"] * batch["input_ids"].size(1) + batch["columns"] + offset)
            offset += batch["input_ids"].numel()
        # Without a mask, transformers keeps texts whose positions start anew from attending to each other.
        with KeepPositions(unwrapped.get_output_embeddings(), slots[torch.cat(supervised)]):
            logits = model(
                input_ids=torch.cat([batch["input_ids"].flatten() for batch in parts])[tokens],
                position_ids=position_ids,
                use_cache=False,
            ).logits[0]
        return dict(zip(batches, logits.split([len(places) for places in supervised]), strict=True))

    @contextmanager
    def reference(self, model: nn.Module):
        """The frozen reference: the same weights with the adapter disabled, without dropout and gradients."""
        unwrapped = self.accelerator.unwrap_model(model)
        training = unwrapped.training
        unwrapped.eval()
        try:
            with torch.no_grad(), unwrapped.disable_adapter():
                yield
        finally:
            unwrapped.train(training)

    def weigh(self, terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
        """Weighted sum of the loss terms, each logged under its name as `<name>_loss`."""
        mode = "train" if self.model.training else "eval"
        for name, value in terms.items():
            # Tensors: turning them into numbers here would wait for the device at every step.
            self._metrics[mode][f"{name}_loss"].append(value.detach())
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
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].update(self._mean_terms(mode))
        super().log(logs, start_time)

    def _mean_terms(self, mode: str) -> dict[str, list[float]]:
        metrics = self._metrics[mode]
        names = [name for name, values in metrics.items() if values and isinstance(values[0], torch.Tensor)]
        # A process whose texts had no part in a term must join in averaging it all the same.
        names = sorted(set(gather_object(names))) if self.accelerator.num_processes > 1 else names
        means = {}
        for name in names:
            values = torch.stack(metrics[name]).float() if metrics[name] else torch.zeros(0, device=self.args.device)
            total = torch.stack([values.sum(), torch.tensor(float(len(values)), device=values.device)])
            total = self.accelerator.reduce(total, reduction="sum")
            mean = (total[0] / total[1]).item()
            if not math.isfinite(mean):
                kept = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
                raise NonFiniteLossError(
                    f"`{name}` became {mean} by step {self.state.global_step}: lower `learning_rate` or `eta`, or "
                    f"train in float32. Last good checkpoint: {kept or 'none yet'}."
                )
            means[name] = [mean]
        return means

    def train(self, resume_from_checkpoint=None, **kwargs):
        output_dir = Path(self.args.output_dir)
        last = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
        if resume_from_checkpoint is True and last is None:
            logger.warning(f"`resume_from_checkpoint` is True, but {output_dir} holds no checkpoint: starting afresh.")
            resume_from_checkpoint = None
        if last and not resume_from_checkpoint:
            raise ValueError(
                f"`output_dir` is {str(output_dir)!r}, which holds the checkpoints of another run ({last}): resume it "
                "with `resume_from_checkpoint=True`, or name another folder."
            )
        run_file = output_dir / RUN_FILE
        fingerprint = self._run_fingerprint()
        if resume_from_checkpoint and run_file.exists():
            saved = json.loads(run_file.read_text(encoding="utf-8"))
            if changed := sorted(key for key in fingerprint if saved.get(key) != fingerprint[key]):
                raise ValueError(
                    f"`output_dir` {str(output_dir)!r} holds a run with other settings ({', '.join(changed)} changed): "
                    "restore them to resume, or name another folder."
                )
        elif self.args.should_save:
            output_dir.mkdir(parents=True, exist_ok=True)
            run_file.write_text(json.dumps(fingerprint, indent=2), encoding="utf-8")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_fingerprint(self) -> dict[str, str]:
        """What must not change between a run and its resumption: the data and the settings of the method."""
        digest = hashlib.sha256()
        for column in ("forget_ids", "retain_ids", "synthetic_ids"):
            for ids in self.train_dataset[column]:
                digest.update(json.dumps(ids).encode())
        own = set(type(self.args).__dataclass_fields__) - set(SFTConfig.__dataclass_fields__)
        settings = {name: repr(getattr(self.args, name)) for name in sorted(own)}
        return settings | {"train_dataset": digest.hexdigest(), "method": type(self).__name__}

    def _save_checkpoint(self, model, trial):
        # Nothing is saved after a loss that was not finite, even between two logs.
        self._mean_terms("train")
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        existed = folder.exists()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            kept = get_last_checkpoint(self.args.output_dir)
            raise OSError(
                f"`output_dir` {self.args.output_dir!r}: checkpoint {folder.name} could not be written ({error}): free "
                f"some space and resume. The unfinished checkpoint was removed; last good one: {kept or 'none yet'}."
            ) from error


def _named(name: str, dataset: Any) -> list[tuple[str, Any]]:
    if dataset is None:
        return []
    if isinstance(dataset, dict):
        return [(f"{name}[{key!r}]", value) for key, value in dataset.items()]
    return [(name, dataset)]


def check_columns(name: str, dataset: Dataset) -> None:
    """Raise `ValueError` unless the dataset has rows and the columns of an erasure dataset."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`{name}` is a {type(dataset).__name__}: pass the `Dataset` of `build_erasure_dataset`.")
    if "forget_ids" not in dataset.column_names and (missing := set(COLUMNS) - set(dataset.column_names)):
        raise ValueError(
            f"`{name}` has the columns {dataset.column_names} and lacks {sorted(missing)}: make it with "
            "`build_erasure_dataset`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty: it needs forget and retain texts.")
    for column in ("forget", "retain"):
        if column in dataset.column_names and not any(text and text.strip() for text in dataset[column]):
            raise ValueError(f"`{name}` has only empty texts in its column {column!r}: fill the {column} set.")


def check_adapter(model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> None:
    """Raise `ValueError` unless the model has, or can be given, a trainable adapter."""
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError(
                f"`peft_config` is given, but the model already carries the adapter {model.active_adapter!r}: leave "
                "`peft_config` out to continue that adapter, or `merge_and_unload()` it first."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"The adapter {model.active_adapter!r} of the model is frozen: load it with "
                "`PeftModel.from_pretrained(..., is_trainable=True)` to continue it."
            )
        return
    if peft_config is None:
        raise ValueError(
            "`peft_config` is None and the model carries no adapter: pass e.g. `peft_config=LoraConfig(r=32, "
            'target_modules="all-linear")`, since the reference is the model with its adapter disabled.'
        )
    if isinstance(model, str):
        return
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model already carries an adapter loaded by `load_adapter`: load it with `PeftModel.from_pretrained` to "
            "continue it, or merge it first."
        )
    config = model.config.get_text_config()
    layers = getattr(peft_config, "layers_to_transform", None)
    layers = [layers] if isinstance(layers, int) else layers or []
    if outside := [layer for layer in layers if not 0 <= layer < config.num_hidden_layers]:
        raise ValueError(
            f"`layers_to_transform` names the layers {outside}, but the model has the layers 0 to "
            f"{config.num_hidden_layers - 1}: choose among these."
        )
    targets = getattr(peft_config, "target_modules", None)
    names = {name for name, module in model.named_modules() if not list(module.children()) and name}
    if isinstance(targets, (list, set, tuple)):
        leaves = {name.rpartition(".")[2] for name in names}
        unknown = [t for t in targets if t not in leaves and not any(n == t or n.endswith(f".{t}") for n in names)]
        if unknown:
            linear = sorted(
                {
                    name.rpartition(".")[2]
                    for name, module in model.named_modules()
                    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
                }
            )
            raise ValueError(f"`target_modules` {sorted(unknown)} match nothing in the model; it has: {linear}.")


def check_tokenizer(model: PreTrainedModel | PeftModel, processing_class: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if the tokenizer can give ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(processing_class) > rows > 0:
        raise ValueError(
            f"`processing_class` has {len(processing_class)} tokens, but the model has {rows} embeddings: it is the "
            "tokenizer of another model; load the model's own."
        )
