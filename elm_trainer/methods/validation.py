"""Checks of what an erasure trainer is given, before anything is computed."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from trl import SFTConfig
from trl.trainer.utils import create_model_from_path

from ..data.tokens import text_tokenizer
from ..modeling import LINEAR, adapter_disabled, evaluating, is_partitioned
from .rows import check_texts


logger = logging.get_logger(__name__)
COLUMNS = ("concept", "forget", "retain", "prompt", "completion")
_OWN_LOSS = "the loss is the method's own"
_OWN_TEXTS = "the dataset has the columns of `build_erasure_dataset`, and every token of a text counts"
_OWN_LAYOUT = "texts are packed without padding in every step"
_NO_LOGITS = "a step makes no logits of whole texts that a metric could read; measure with `ErasureEvaluationCallback`"
# Options of `SFTConfig` that an erasure cannot follow, and why.
REFUSED_OPTIONS = {
    "assistant_only_loss": _OWN_TEXTS,
    "completion_only_loss": _OWN_TEXTS,
    "dataset_text_field": _OWN_TEXTS,
    "dataset_kwargs": _OWN_TEXTS,
    "chat_template_path": "texts are rendered by `build_erasure_dataset`: set the tokenizer's `chat_template` before",
    "truncation_mode": "texts are cut at their end",
    "loss_type": _OWN_LOSS,
    "label_smoothing_factor": _OWN_LOSS,
    "router_aux_loss_coef": _OWN_LOSS,
    "packing": _OWN_LAYOUT,
    "eval_packing": _OWN_LAYOUT,
    "padding_free": _OWN_LAYOUT,
    "parallelism_config": "texts are not split over devices",
    "include_for_metrics": _NO_LOGITS,
    "batch_eval_metrics": _NO_LOGITS,
    "label_names": _NO_LOGITS,
}
# Arguments of `SFTTrainer` likewise.
REFUSED_ARGUMENTS = {
    "compute_loss_func": _OWN_LOSS,
    "compute_metrics": _NO_LOGITS,
    "preprocess_logits_for_metrics": _NO_LOGITS,
    "formatting_func": _OWN_TEXTS,
}
# Options that change nothing here.
WITHOUT_EFFECT = {
    "packing_strategy": _OWN_LAYOUT,
    "average_tokens_across_devices": "a loss is a mean over texts, not over tokens",
    "eval_accumulation_steps": "an evaluation keeps no logits",
    "eval_do_concat_batches": "an evaluation keeps no logits",
    "eval_use_gather_object": "an evaluation keeps no logits",
}


def check_options(args: SFTConfig, arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what `SFTTrainer` would follow and an erasure would not.

    Args:
        args: Config of a method.
        arguments: Arguments of the trainer by name.
    """
    if args.push_to_hub and args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"`hub_strategy` is {args.hub_strategy.value!r}, which uploads checkpoints as they are, without report and "
            "checks: use 'end', and `push_to_hub()` after the evaluation."
        )
    for name, why in REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"`{name}` is given, but {why}: leave it out.")
    for name, why in REFUSED_OPTIONS.items():
        if (value := getattr(args, name)) != _default(name):
            raise ValueError(f"`{name}` is {value!r}, but {why}: leave it out.")
    for name, why in WITHOUT_EFFECT.items():
        if (value := getattr(args, name)) != _default(name):
            logger.warning(f"`{name}` has no effect, though it is {value!r}: {why}.")
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError(
            "`activation_offloading` is True, but there is no accelerator to bring them from: leave it out."
        )
    for name in ("split_batches", "dispatch_batches"):
        if args.world_size > 1 and getattr(args.accelerator_config, name, None):
            raise ValueError(
                f"`accelerator_config` has `{name}=True`, but a batch holds texts of several lengths, which cannot be cut for "
                "the processes: leave it out."
            )


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The datasets that a trainer is given, by what a message should call each.

    Raises:
        TypeError: if `train_dataset` is several.
    """
    if isinstance(train_dataset, dict):
        raise TypeError(
            f"`train_dataset` is a {type(train_dataset).__name__} with {list(train_dataset)}: give one of them, such as "
            f"`train_dataset[{next(iter(train_dataset), 'train')!r}]`."
        )
    found = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        found |= {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    else:
        found["eval_dataset"] = eval_dataset
    return {name: dataset for name, dataset in found.items() if dataset is not None}


def _default(name: str) -> Any:
    field = SFTConfig.__dataclass_fields__[name]
    return field.default if field.default_factory is MISSING else field.default_factory()


def load_given(
    model: str | PreTrainedModel | PeftModel,
    args: SFTConfig,
    processing_class: PreTrainedTokenizerBase | None,
    quantization_config: Any = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, loaded as [`~trl.SFTTrainer`] would where they are not given.

    Args:
        model: Model, its folder or its id on the Hub.
        args: Config; `model_init_kwargs` are used up by the loading.
        processing_class: Tokenizer, or a processor, whose tokenizer is taken.
        quantization_config: See [`~trl.SFTTrainer`].

    Raises:
        ValueError: if there is no tokenizer beside the model.
    """
    if isinstance(model, str):
        options = dict(args.model_init_kwargs or {})
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None
        options.setdefault("trust_remote_code", args.trust_remote_code)
        set_seed(args.seed)
        model = create_model_from_path(model, **options)
        args.model_init_kwargs = None
    elif quantization_config is not None:
        raise ValueError(
            "`quantization_config` is given, but the model is already loaded: load it with that, or leave it out."
        )
    if processing_class is None:
        source = model.config._name_or_path
        try:
            processing_class = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`processing_class` is None: pass the model's tokenizer. None was found at {source!r}, where the model was "
                "loaded from."
            ) from error
    return model, text_tokenizer(processing_class)


def check_columns(datasets: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless each dataset has rows and the columns of an erasure dataset."""
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`{name}` is a {type(dataset).__name__}: pass the `Dataset` of `build_erasure_dataset`.")
        if "forget_ids" not in dataset.column_names and (missing := set(COLUMNS) - set(dataset.column_names)):
            raise ValueError(
                f"`{name}` has the columns {dataset.column_names} and lacks {sorted(missing)}: make it with "
                "`build_erasure_dataset`."
            )
        if len(dataset) == 0:
            raise ValueError(f"`{name}` is empty: it needs forget and retain texts.")
        if "forget_ids" not in dataset.column_names:
            check_texts(dataset, name)


def check_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> None:
    """Raise `ValueError` unless the model has, or can be given, a trainable adapter."""
    for config in [peft_config] if peft_config is not None else getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"`peft_config` is a {type(config).__name__}, which puts tokens before every text and trains no weight of a "
                "layer: use a `LoraConfig`, or another that adapts layers."
            )
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
                {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LINEAR)}
            )
            raise ValueError(f"`target_modules` {sorted(unknown)} match nothing in the model; it has: {linear}.")


def check_start(model: PeftModel, tokens: Sequence[int], base: torch.Tensor | None) -> None:
    """Raise `ValueError` for an adapter in place that fits the model badly, or leaves no reference ([`check_reference`]); warn
    of one that [`load_erased`] would refuse.

    Args:
        model: Model with its adapter, before training.
        tokens: Token ids of a short text.
        base: [`base_logits`] of the model before it had an adapter.
    """
    _check_patterns(model)
    _warn_of_loading(model)
    if _can_run(model):
        check_reference(model, tokens, base)


def base_logits(model: nn.Module, tokens: Sequence[int]) -> torch.Tensor | None:
    """Logits of the model without an adapter; `None` where it has one already, or cannot be run here."""
    return _few_logits(model, tokens) if _can_run(model) and not isinstance(model, PeftModel) else None


def _can_run(model: nn.Module) -> bool:
    # Weights that lie in shards, or have no content yet, cannot be run by one process.
    return not is_partitioned(model) and not any(parameter.is_meta for parameter in model.parameters())


def _check_patterns(model: PeftModel) -> None:
    """Raise `ValueError` where a setting of the adapter names nothing in the model, of which PEFT says nothing."""
    config = model.peft_config[model.active_adapter]
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or {}:
            # As `peft.utils.get_pattern_key` matches them; PEFT itself adds patterns of experts' parameters.
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in (*modules, *parameters)):
                raise ValueError(f"`{field}` names {pattern!r}, which matches no module of the model: correct it.")
    for field, names in (("modules_to_save", modules), ("target_parameters", parameters)):
        for wanted in getattr(config, field, None) or []:
            # What an adapter wraps is called after its own parts from then on.
            leaf = wanted.rpartition(".")[2]
            if not any(leaf in name.split(".") for name in names):
                raise ValueError(f"`{field}` names {wanted!r}, which the model does not have: correct it.")


def _warn_of_loading(model: PeftModel) -> None:
    """Warn where [`load_erased`] would refuse what is about to be trained, which PEFT itself may load."""
    # What may be loaded is for `hub` to say, which lies above this file: it is asked through the package's front door.
    import elm_trainer

    for config in model.peft_config.values():
        # As it will stand in `adapter_config.json`.
        record = json.loads(json.dumps(config.to_dict(), default=list))
        record |= {"task_type": record["task_type"] or "CAUSAL_LM", "auto_mapping": None}
        if objection := elm_trainer.loading_objection(record):
            logger.warning(
                "`load_erased` and `publish_adapter` will refuse this adapter, which `PeftModel.from_pretrained` loads. "
                f"{objection}"
            )


def _few_logits(model: nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """Logits of one short text in evaluation mode, `[seq, vocab]`, float32."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)], device=device), use_cache=False).logits[0].float()


def check_reference(model: PeftModel, tokens: Sequence[int], base: torch.Tensor | None) -> None:
    """Raise `ValueError` unless the model with its adapter disabled is its base, now and when the adapter is trained, and the
    adapter changes nothing yet.

    Args:
        model: Model with its adapter, before training.
        tokens: Token ids of a short text.
        base: [`few_logits`] of the base before it had an adapter.
    """
    name = model.active_adapter
    with adapter_disabled(model):
        reference = _few_logits(model, tokens)
    # DoRA and the like compute the same in another way.
    rounding = max(1e-3, 4 * torch.finfo(model.dtype).eps)

    def differs(logits: torch.Tensor) -> bool:
        # The base was run where it was given, and the Trainer may have brought it to its device since.
        return bool((logits.to(reference.device) - reference).abs().max() > rounding * reference.abs().max())

    start = getattr(model.peft_config[name], "init_lora_weights", True)
    if base is not None and differs(base):
        raise ValueError(
            f"`peft_config` rewrites the base's weights (`init_lora_weights` is {start!r}), so that the model without the "
            "adapter is no reference: leave `init_lora_weights` at True."
        )
    try:
        own = _few_logits(model, tokens)
    except (AttributeError, RuntimeError, TypeError) as error:
        layers = {name.rpartition(".")[2]: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        special = sorted(name for name, layer in layers.items() if type(layer.get_base_layer()) not in LINEAR)
        raise ValueError(
            f"A forward through the adapter fails ({error}). `target_modules` adapts {special}, which are no plain linear "
            "modules: leave them out, by `exclude_modules` or by naming others."
        ) from error
    if differs(own):
        raise ValueError(
            f"The adapter {model.active_adapters!r} changes the model before training (`init_lora_weights` is {start!r}), so "
            "that training would not start at the reference, which is the model without it: start a new adapter, after "
            "`merge_and_unload()` if the reference is to have this one; a run that was cut short is continued "
            "by `resume_from_checkpoint`."
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    try:
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1)
        with adapter_disabled(model):
            moved = differs(_few_logits(model, tokens))
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)
    if moved:
        bias = getattr(model.peft_config[name], "bias", "none")
        raise ValueError(
            f"`peft_config` trains weights that stay when the adapter is disabled (`bias` is {bias!r}), so that the reference "
            "would move in training: set `bias` to 'none', and train nothing outside the adapter."
        )


def text_limit(model: PreTrainedModel | PeftModel, max_length: int | None, context: int = 0) -> int | None:
    """Tokens that a text may have: `max_length`, or fewer where the model has fewer positions; `None` for any number.

    Args:
        max_length: What the config says.
        context: Tokens of the longest context that is put before a text.

    Raises:
        ValueError: if no text of two tokens fits.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        positions = None
    limit = max_length
    if positions is not None and (max_length is None or max_length > positions - context):
        limit = positions - context
        logger.warning(
            f"`max_length` is {max_length}, but the model has {positions} positions"
            f"{f', of which contexts take up to {context}' if context else ''}: texts are cut at {limit} tokens."
        )
    if limit is not None and limit < 2:
        raise ValueError(
            f"`max_length` is {max_length} and the model has {positions} positions, of which contexts take up to {context}, so "
            "that every text truncates to nothing: raise it, or use shorter contexts."
        )
    return limit


def check_tokenizer(model: PreTrainedModel | PeftModel, processing_class: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token if it has none; raise `ValueError` if it has ids that the model has no embedding for."""
    if processing_class.pad_token is None:
        # Padding is masked, so any token will do where there is no end token either.
        pad = processing_class.eos_token or processing_class.convert_ids_to_tokens(0)
        processing_class.pad_token = pad
        logger.warning(f"The tokenizer has no pad token; `pad_token` is set to {pad!r}.")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(processing_class) > rows > 0:
        raise ValueError(
            f"`processing_class` has {len(processing_class)} tokens, but the model has {rows} embeddings: it is the "
            "tokenizer of another model; load the model's own."
        )
