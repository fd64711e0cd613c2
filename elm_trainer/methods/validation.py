"""What an erasure trainer is given: model, tokenizer, datasets and adapter are checked, and texts become token ids."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging
from trl import SFTConfig
from trl.trainer.utils import create_model_from_path

from ..data.collator import align
from ..data.tokens import text_ids, text_tokenizer, tokenize_pair
from ..modeling import LINEAR, adapter_disabled, evaluating, is_partitioned


logger = logging.get_logger(__name__)
_TEXTS = ("concept", "forget", "retain", "prompt", "completion")
_SIDES = ("forget", "retain", "synthetic")
# Columns of a tokenized dataset, which the Trainer leaves to the collator.
COLUMNS = (
    "row", "concept", "forget_ids", "retain_ids", "retain_start", "novice_ids", "novices_ids", "aligned",
    "synthetic_ids", "completion_start",
)  # fmt: skip


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


def load_given(
    model: str | PreTrainedModel | PeftModel,
    args: SFTConfig,
    processing_class: PreTrainedTokenizerBase | None,
    quantization_config: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, loaded as [`~trl.SFTTrainer`] would where they are not given; of a processor its tokenizer.

    `model_init_kwargs` of the config are used up by the loading. Raises `ValueError` if no tokenizer lies beside the model.
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
        tokenized = "forget_ids" in dataset.column_names
        if not tokenized and (missing := set(_TEXTS) - set(dataset.column_names)):
            raise ValueError(
                f"`{name}` has the columns {dataset.column_names} and lacks {sorted(missing)}: make it with "
                "`build_erasure_dataset`."
            )
        if len(dataset) == 0:
            raise ValueError(f"`{name}` is empty: it needs forget and retain texts.")
        if not tokenized:
            _check_texts(dataset, name)


def _check_texts(dataset: Dataset, name: str) -> None:
    """Raise `ValueError` unless a dataset called `name` holds text in each row, and not empty texts alone."""
    plain = dataset.with_format(None)
    completions = plain["completion"][:]
    for column in _TEXTS:
        values = plain[column][:]
        for row, (value, completion) in enumerate(zip(values, completions, strict=True)):
            without_pair = value is None and not completion and column in ("prompt", "completion")
            if not isinstance(value, str) and not without_pair:
                raise ValueError(
                    f"`{name}`, row {row}: `{column}` is {str(value)[:60]}, of type {type(value).__name__}, where text is "
                    "needed: correct the row or leave it out."
                )
        if column in ("forget", "retain") and not any(map(str.strip, values)):
            raise ValueError(f"`{name}` has only empty texts in its column {column!r}: fill the {column} set.")


def _tokenize_row(
    example: Mapping[str, Any], processing_class: PreTrainedTokenizerBase, limit: int | None
) -> dict[str, Any]:
    """`COLUMNS` but for `row` of one row of an erasure dataset, each text cut to `limit` tokens; `too_long`, which of `_SIDES`
    were cut; and `usable`, whether each text still has a token to predict.
    """
    starts = dict.fromkeys(_SIDES, 0)
    texts: dict[str, list[int]] = {"forget": text_ids(processing_class, example["forget"]), "synthetic": []}
    if prompt := example.get("retain_prompt"):
        answer = example["retain"].removeprefix(prompt)
        texts["retain"], starts["retain"] = tokenize_pair(processing_class, prompt, answer)
    else:
        texts["retain"] = text_ids(processing_class, example["retain"])
    if example["completion"]:
        pair = tokenize_pair(processing_class, example["prompt"], example["completion"])
        texts["synthetic"], starts["synthetic"] = pair
    kept = {side: texts[side][:limit] for side in _SIDES}
    left = {side: len(kept[side]) - max(starts[side], 1) for side in _SIDES}
    novices = [text_ids(processing_class, text)[:limit] for text in example.get("novices") or []]
    return {f"{side}_ids": kept[side] for side in _SIDES} | {
        "concept": example["concept"],
        "retain_start": starts["retain"],
        "completion_start": starts["synthetic"],
        "novice_ids": text_ids(processing_class, example.get("novice") or "")[:limit],
        "novices_ids": novices,
        "aligned": align(kept["forget"], novices),
        "too_long": [len(kept[side]) < len(texts[side]) for side in _SIDES],
        "usable": min(left["forget"], left["retain"]) > 0 and (left["synthetic"] > 0 or not texts["synthetic"]),
    }


def tokenize_dataset(
    dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: SFTConfig, limit: int | None, name: str
) -> Dataset:
    """The rows of an erasure dataset as token ids, of each text at most `limit`, numbered in the column `row`, without those that
    hold nothing to learn. Raises `ValueError` if no row is left.
    """
    length = args.length_column_name if args.train_sampling_strategy == "group_by_length" else None

    def tokenize(example: Mapping[str, Any]) -> dict[str, Any]:
        tokens = _tokenize_row(example, processing_class, limit)
        # What the sampler of transformers groups by.
        return tokens | ({length: sum(len(tokens[f"{side}_ids"]) for side in _SIDES)} if length else {})

    # Names of the texts are kept apart from their tokens, which alone stay in the dataset.
    dataset = dataset.with_format(None).map(
        tokenize,
        remove_columns=dataset.column_names,
        num_proc=args.dataset_num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    flags = dataset.select_columns(["too_long", "usable"])[:]
    usable = [row for row, fits in enumerate(flags["usable"]) if fits]
    dropped = len(dataset) - len(usable)
    truncated = {side: sum(cut) for side, cut in zip(_SIDES, zip(*flags["too_long"], strict=True), strict=True)}
    if any(truncated.values()) or dropped:
        logger.warning(
            f"The {name} dataset: cut to `max_length={limit}` tokens: {truncated}; dropped {dropped} of {len(dataset)} rows "
            "that hold nothing to learn after that."
        )
    if not usable:
        raise ValueError(
            f"`max_length` is {limit}, at which every text of the {name} dataset truncates to nothing: raise it, or give "
            "texts of two tokens and more."
        )
    dataset = dataset.remove_columns(["too_long", "usable"]).select(usable)
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    return dataset.add_column("row", list(range(len(dataset))))


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
    if isinstance(targets, (list, set, tuple)):
        modules = {name: module for name, module in model.named_modules() if name and not list(module.children())}
        if unknown := [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in modules)]:
            linear = sorted(
                {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, LINEAR)}
            )
            raise ValueError(f"`target_modules` {sorted(unknown)} match nothing in the model; it has: {linear}.")


def check_start(model: PeftModel, tokens: Sequence[int], base: torch.Tensor | None) -> None:
    """Raise `ValueError` for an adapter in place that fits the model badly, or leaves no reference ([`check_reference`]); warn
    of one that [`load_erased`] would refuse.
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
    adapter changes nothing yet, on a short text whose logits before there was an adapter were `base` ([`base_logits`]).
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


def text_limit(model: PreTrainedModel | PeftModel, max_length: int | None, context: int) -> int | None:
    """Tokens that a text may have behind a context of so many: `max_length`, or fewer where the model has fewer positions; `None`
    for any number. Raises `ValueError` if no text of two tokens fits.
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
