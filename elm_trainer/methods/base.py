"""`ErasureTrainer`: what the erasure methods share over TRL's `SFTTrainer`."""

import math
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..data.collator import ElmDataCollator
from ..data.packing import PackingPlan
from ..distributed import align_checkpointing, check_saving, on_first, trained_weights
from ..files import RUN_FILE, write_json
from ..head import STATES, Plan, Reading
from ..modeling import adapter_disabled, evaluating, keep_differentiable, no_graph_below, reentrant
from ..run_lock import only_run_in
from .checkpointing import begin_run, last_good, replacing_files, saving_checkpoint
from .config import check_options, fixed_settings, recipe
from .forward import (
    SUB_BATCHES,
    NonFiniteLossError,
    PackedForward,
    PackInCollator,
    TermTotals,
    batch_mean,
    kl_reading,
    nll_reading,
    plain_tokens,
    weighted_batches,
)
from .validation import (
    COLUMNS,
    base_logits,
    check_adapter,
    check_columns,
    check_start,
    check_tokenizer,
    load_given,
    named_datasets,
    text_limit,
    tokenize_dataset,
)


class ErasureTrainer(SFTTrainer):
    """TRL's `SFTTrainer` on erasure data: sub-batches, a frozen reference in the same weights, one forward, logged terms.

    Subclasses name their config in `_config_class` and override `compute_loss`, or only `erase_term`. The arguments are
    those of [`~trl.SFTTrainer`]; the dataset has the columns of [`build_erasure_dataset`], and the model is trained
    through an adapter, since the reference is the same model with the adapter disabled. A method that can train the
    weights themselves sets `_needs_adapter` to `False` and overrides `reference` for that case.

    A model given as a string is loaded as [`~trl.SFTTrainer`] does; without `processing_class` its tokenizer is too.

    Raises:
        TypeError: if `args` is not the method's own config.
        ValueError: if there is no tokenizer or it does not fit, there is no adapter and no `peft_config`, the adapter
            is frozen, names layers or modules the model lacks, or leaves no untouched reference, a dataset is empty,
            lacks a column or truncates to nothing, or an option is one that no erasure can follow (`REFUSED_OPTIONS`).
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
        if args is None:
            args = self._config_class(f"{self._name.lower()}-output")
        elif not isinstance(args, self._config_class):
            raise TypeError(
                f"`args` is of type {type(args).__name__}: {type(self).__name__} takes its own {self._config_class.__name__}."
            )
        self._totals = {mode: TermTotals(args.device) for mode in ("train", "eval")}
        check_options(args, kwargs)
        datasets = named_datasets(train_dataset, eval_dataset)
        check_columns(datasets)
        model, processing_class = load_given(model, args, processing_class, kwargs.pop("quantization_config", None))
        with_adapter = self._needs_adapter or peft_config is not None or isinstance(model, PeftModel)
        if with_adapter:
            check_adapter(model, peft_config)
        check_tokenizer(model, processing_class)
        if data_collator is None:
            data_collator = self.default_collator(args, processing_class, datasets)
        keep_differentiable(model)
        context = data_collator.longest_context() if isinstance(data_collator, ElmDataCollator) else 0
        self._text_limit = text_limit(model, args.max_length, context)
        self.check_given(model, args, datasets, data_collator)
        tokens = plain_tokens(processing_class, model.config.get_text_config().vocab_size, 16)
        base = base_logits(model, tokens) if with_adapter else None
        super().__init__(
            model, args, data_collator=data_collator, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processing_class, peft_config=peft_config, **kwargs,
        )  # fmt: skip
        self.args.prediction_loss_only = True  # a step makes no logits of whole texts
        self.packed = self._new_packed()
        self.add_callback(PackInCollator(self, data_collator, lambda: self.packed.rule(self.model_wrapped)))
        if isinstance(self.model, PeftModel):
            check_start(self.model, tokens, base)
        self.set_up()

    def default_collator(self, args: SFTConfig, processing_class: Any, datasets: Mapping[str, Dataset]) -> Any:
        """The collator where none is given."""
        return ElmDataCollator(processing_class, pad_to_multiple_of=args.pad_to_multiple_of, seed=args.seed)

    def check_given(
        self, model: nn.Module, args: SFTConfig, datasets: Mapping[str, Dataset], data_collator: Any
    ) -> None:
        """Raise for arguments that this method cannot work with. It is called before the model gets its adapter."""

    def set_up(self) -> None:
        """What the method itself does when the trainer is made, after all else."""

    # Private to TRL and transformers, as is `_set_signature_columns_if_needed`, but the only places where tokenization can be
    # replaced before `Trainer.__init__`. tests/methods/test_base.py fails when they move.
    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if "forget_ids" in dataset.column_names:
            return dataset
        return tokenize_dataset(dataset, processing_class, args, self._text_limit, dataset_name)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [*COLUMNS, self.args.length_column_name]

    def forward_positions(
        self,
        model: nn.Module,
        batches: Mapping[str, Mapping[str, torch.Tensor]],
        readings: Mapping[str, Reading | Plan] | None = None,
    ) -> dict[str, Any]:
        """Logits of supervised positions, read in one forward over sub-batches: see [`PackedForward.read`]."""
        return self.packed.read(model, batches, readings or {})

    def reference_positions(
        self, model: nn.Module, batches: Mapping[str, Any], readings: Any = None
    ) -> dict[str, Any]:
        """The same as `forward_positions`, for the frozen reference."""
        with self.reference(model):
            return self.forward_positions(model, batches, readings)

    @contextmanager
    def reference(self, model: nn.Module):
        """The frozen reference: the same weights with the adapter disabled, without dropout and gradients."""
        unwrapped = self.accelerator.unwrap_model(model)
        with evaluating(unwrapped), torch.no_grad(), adapter_disabled(unwrapped):
            yield

    def position_losses(
        self, model: nn.Module, batches: Mapping[str, Mapping[str, Any]], retain_loss: str = "nll"
    ) -> dict[str, torch.Tensor]:
        """Negative log-likelihood of every label, `[positions]` for each sub-batch by the name of its term, in one forward.

        With `retain_loss="kl"` the term `retain` gets `KL(reference ‖ adapted)` (both as in TOFU, arXiv 2401.06121, §3.3).
        """
        readings: dict[str, Reading | Plan] = {name: nll_reading(batch) for name, batch in batches.items()}
        if retain_loss == "kl" and "retain" in batches:
            states = self.reference_positions(model, {"retain": batches["retain"]}, {"retain": STATES})
            readings["retain"] = Plan(kl_reading, [states["retain"]])
        return self.forward_positions(model, batches, readings)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`λe·erase_term + λr·R`, with `R` the mean over retain texts of what `position_losses` gives for them."""
        weights = {"erase": self.args.erase_weight, "retain": self.args.retain_weight}
        batches = weighted_batches(inputs, weights)
        values = self.position_losses(model, batches, self.args.retain_loss)
        means = {"erase": partial(self.erase_term, model), "retain": batch_mean}
        loss = self.weigh({name: means[name](value, batches[name]) for name, value in values.items()}, weights)
        return (loss, None) if return_outputs else loss

    def erase_term(self, model: nn.Module, nll: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        """A method's loss on forget text, from the negative log-likelihood `[positions]` of the batch's labels."""
        raise NotImplementedError

    def _new_packed(self) -> PackedForward:
        return PackedForward(self.accelerator.unwrap_model, self.processing_class, self.args.pad_to_multiple_of)

    def packed_together(self) -> list[tuple[str, ...]]:
        """Names of the sub-batches that share a forward, for each forward of a step: those of all terms that have a weight, and
        retain text alone for the reference of a KL, which a method without `retain_loss` may have too.
        """
        args = self.args
        step = tuple(name for term, name in SUB_BATCHES.items() if getattr(args, f"{term}_weight", 0))
        return [step, *[("retain",)] * (getattr(args, "retain_loss", "kl") == "kl" and "retain" in step)]

    def on_device(self, batch: Mapping[str, Any], sharing: bool = False) -> dict[str, Any]:
        """A batch of the collator on the model's device; with `sharing`, forwards beside the step's share what texts begin with."""
        if sharing:
            groups = [*dict.fromkeys(self.packed_together()[1:])]
            PackingPlan(self.packed.rule(self.model), groups).share(batch, self.model)
        return self._prepare_inputs(batch)

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
        self.data_collator = replace(collator, targets=None) if isinstance(collator, ElmDataCollator) else collator
        try:
            yield
        finally:
            self.data_collator = collator

    # Private to transformers, which looks for `input_ids` at the top of a batch. tests/methods/test_options.py holds it.
    def _track_num_input_tokens(self, inputs):
        parts = [batch for batch in inputs.values() if isinstance(batch, Mapping) and "input_ids" in batch]
        super()._track_num_input_tokens(
            {name: torch.cat([batch[name].flatten() for batch in parts]) for name in ("input_ids", "attention_mask")}
        )

    def floating_point_ops(self, inputs):
        return 6 * sum(batch["input_ids"].numel() for batch in inputs.values()) * self._parameter_count

    @cached_property
    def _parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def weigh(self, terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
        """Weighted sum of the loss terms, each logged as `<name>_loss`."""
        self._totals["train" if self.model.training else "eval"].add(terms)
        return sum((weights[name] * value for name, value in terms.items()), torch.zeros((), device=self.args.device))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def log(self, logs, start_time=None):
        if self.model.training:
            self._metrics["train"].update(self._mean_terms("train"))
            self._totals["train"].clear()
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        # Beside the loss, so that each of several datasets has its own terms in the log and to choose a checkpoint by.
        self._totals["eval"].clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        for name, [mean] in self._mean_terms("eval").items():
            output.metrics[f"{metric_key_prefix}_{name}"] = mean
        return output

    def _mean_terms(self, mode: str) -> dict[str, list[float]]:
        means = {f"{name}_loss": [mean] for name, mean in self._totals[mode].means(self.accelerator).items()}
        for name, [mean] in means.items():
            if not math.isfinite(mean):
                raise NonFiniteLossError(
                    f"`{name}` became {mean} by step {self.state.global_step}: lower `learning_rate` or the term's "
                    f"weight, or train in float32. Last good checkpoint: {last_good(self.args.output_dir)}."
                )
        return means

    def train(self, resume_from_checkpoint=None, **kwargs):
        check_saving(self)
        align_checkpointing(self)
        if self.accelerator.num_processes > 1:
            # Those that computed no targets have not measured the model yet, and all must do so in the same forward.
            self.packed = self._new_packed()
        with only_run_in(self.args.output_dir):
            checkpoint = on_first(lambda: begin_run(self, resume_from_checkpoint, self._run_record()))
            with nullcontext() if reentrant(self.args) else no_graph_below(self.model):
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _run_fingerprint(self) -> dict[str, str]:
        return fixed_settings(self.args, self.train_dataset) | {"method": type(self).__name__}

    def _run_record(self) -> dict[str, Any]:
        return self._run_fingerprint() | {"recipe": recipe(self.args)}

    def push_to_hub(
        self,
        commit_message: str = "Publish the erased adapter",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> Any:
        """Publish the adapter with its report, as [`publish_adapter`] does.

        The repository is `hub_model_id`, else the name of `output_dir`; it is made private unless `private` or
        `hub_private_repo` says otherwise. The adapter is saved to `output_dir/adapter`, the reports are read from
        `report.json` and, if there is one, `attacks.json` in `output_dir`. Raises what [`publish_adapter`] raises.

        Args:
            commit_message (`str`, *optional*): First line of the commit's message.
            blocking (`bool`, *optional*, defaults to `True`): Must be `True`: what is published is checked first.
            token, revision (`str`, *optional*): Token and branch; `hub_token` and `hub_revision` by default.
            options: Any other argument of [`publish_adapter`], or field of its [`CardDetails`] and [`PublishOptions`].

        Returns:
            [`Publication`], or `None` on processes other than the first.
        """
        # Publishing lies above this file, so it is reached through the front door of the package, as users reach it.
        import elm_trainer

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
        private = self.args.hub_private_repo if private is None else private
        options |= dict(private=private, revision=revision or self.args.hub_revision, commit_message=commit_message)
        return elm_trainer.publish_adapter(
            output / "adapter",
            self.args.hub_model_id or output.resolve().name,
            report=report,
            attacks=None if isinstance(attacks, Path) and not attacks.exists() else attacks,
            model=self.accelerator.unwrap_model(self.model),
            processing_class=self.processing_class,
            details=replace(elm_trainer.CardDetails.pop_from(options), method=type(self).__name__),
            options=elm_trainer.PublishOptions.pop_from(options),
            api=HfApi(token=token or self.args.hub_token),
            **options,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Do nothing: Trainer would make a repository, public by default, before there is anything to publish."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call or not self.args.should_save:
            self._write_model(folder)
            return
        with replacing_files(folder) as staged:
            self._write_model(staged)
            # Beside the adapter too, so that whoever publishes it knows its method and all of its settings.
            write_json(staged / RUN_FILE, self._run_record())

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
        # PEFT writes a card of gaps and the base's path on this machine; `publish_adapter` makes a true one.
        if self.args.should_save:
            (folder / "README.md").unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial):
        # Nothing is saved after a loss that was not finite, even between two logs.
        self._mean_terms("train")
        with saving_checkpoint(self, Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)
