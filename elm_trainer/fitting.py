"""Settings that fit a model and a machine, by stated rules, from the model's config alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .distributed import free_memory, multiplies_in_bfloat16
from .modeling import LINEAR, decoder_layers


# As `lora_layers`: the layers are found in the model, by `find_readout`.
AUTO = "auto"
# Rows of an update, and how many of them run at once: as many as fit.
UPDATE_ROWS = 10
_BATCHES = {10: 32, 5: 16, 2: 6, 1: 3}
_RANK = 64
# Share of the layers below the first adapted one, and below the last.
_FIRST, _LAST = 0.4, 0.8
# Share of the free memory that a run may plan to use.
USABLE = 0.8
# What Python and the libraries hold on a CPU, and the logits of a chunk of positions with their gradient.
_PROCESS, _HEAD = 800 * 2**20, 128 * 2**20
OPTIONS = (
    "lora_layers", "lora_targets", "lora_rank", "lora_alpha", "per_device_train_batch_size",
    "gradient_accumulation_steps", "per_device_eval_batch_size", "dtype", "bf16", "activation_checkpointing",
)  # fmt: skip
# Objectives with their schedules, the first three for counterfactual novices. The first is that of recipes/smollm2-135m-capitals.yaml,
# with the layer found in the model, and the third that of recipes/smollm2-135m-capitals-log-space.yaml; tests/test_fitting.py holds
# them to it. The last is the paper's, with the schedule of recipes/smollm2-135m-capitals-released.yaml and a tenth of its rate.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "readout": {
        "novice": "counterfactual", "erase_weight": 0.0, "state_weight": 1.0, "state_eta": 1.5,
        "retain_loss": "states", "retain_weight": 2.0, "consistency_weight": 0.0,
        "lora_layers": AUTO, "learning_rate": 6e-3, "adam_beta2": 0.98,
        "lr_scheduler_type": "linear", "warmup_steps": 10, "max_grad_norm": 1.0,
    },
    "terms": {
        "novice": "counterfactual", "erase_weight": 0.0, "state_weight": 1.0, "state_eta": 2.0, "state_names": True,
        "retain_loss": "states", "retain_weight": 0.7, "consistency_weight": 0.0, "lora_targets": "all-linear",
        "learning_rate": 4e-3, "adam_beta2": 0.98, "lr_scheduler_type": "linear", "warmup_steps": 10, "max_grad_norm": 1.0,
    },
    "log-space": {
        "novice": "counterfactual", "eta": 1.3, "log_tokens": 8, "log_strength": 3.0, "fact_share": 0.7,
        "retain_loss": "log", "retain_focus": 0.5, "retain_weight": 6.0, "consistency_weight": 0.0, "contrast_rows": 384,
        "contrast_damping": 0.03, "learning_rate": 3e-3, "adam_beta2": 0.98, "lr_scheduler_type": "linear",
        "warmup_steps": 8, "max_grad_norm": 1.0,
    },
    "contexts": {
        "novice": "contexts", "preset": "paper", "synthetic_size": 48, "learning_rate": 1e-4,
        "lr_scheduler_type": "linear", "warmup_steps": 5, "max_grad_norm": 1.0,
    },
}  # fmt: skip
_TESTED = {
    "readout": "every text has novices: what is near stays, and answers differ as they did",
    "terms": "a mere name without facts: its terms become unknown words where the model first reads them",
    "contexts": "not every text has novices: the paper's, at a rate that breaks nothing; facts or documents erase more",
}
# At the readout, where stand-ins are read alike ([`likeness`]): the step to the novice is a short one.
_IF_ALIKE = {"state_eta": 2.5, "retain_weight": 1.5}
# Where terms become unknown words: the share of the layers below the first adapted one, and below the last.
_TERMS_FIRST, _TERMS_LAST = 0.1, 0.3
# Short rows are fastest attended to by plain products, of few shapes; in bfloat16 they need `use_cpu`.
_ON_CPU = {"use_cpu": True, "attn_implementation": "eager", "pad_to_multiple_of": 8}
# Fewest and most rows, and how often each is seen: together about as many as the recipes of the two objectives train on.
_ROWS = {"readout": (256, 1024), "terms": (256, 1536), "log-space": (512, 512), "contexts": (128, 1024)}
_EPOCHS = {"readout": 10.0, "terms": 4.0, "log-space": 2.0, "contexts": 3.0}
_FEWEST_STEPS = 600  # states are led slowly, where there are few rows too
# Bounds of the longest text in tokens.
_LENGTHS = (80, 256)


class Choice(NamedTuple):
    """A setting that was chosen, and why."""

    value: Any
    reason: str


class FittedSettings(NamedTuple):
    """What [`fitting_settings`] chooses."""

    choices: dict[str, Choice]  # by the names of `OPTIONS`
    needed: int  # bytes that a step takes by its rule
    fits: bool  # whether that is within the usable memory


def fitting_settings(
    model: PreTrainedConfig | PreTrainedModel,
    *,
    memory: int | None = None,
    device: torch.device | str | None = None,
    row_tokens: int = 192,
    given: Mapping[str, Any] | None = None,
) -> FittedSettings:
    """Choose layers, rank, batch and precision from a model's size and depth and the free memory.

    The rules, with L layers numbered from 0, hidden size h, W weights:

    - **layers**: from `round(.4·L)` to `round(.8·L)`: 12 to 24 of 30, the best found on dev questions of SmolLM2-135M, and
      7 to 14 of 18, which Gemma 3 270M uses.
    - **modules**: those that lead into the feed-forward part (gate and up projections): linear, outside of attention,
      with h inputs and at least h outputs, and none that leads back to h. All linear modules where there are none.
    - **rank**: 64, or the largest power of two up to `h / 4` if that is less; alpha is the rank.
    - **precision**: products in bfloat16 where the device multiplies in it. Weights in bfloat16 on such an accelerator; on
      a CPU in float32 if ten rows then fit, else in bfloat16.
    - **batch**: the largest of 10, 5, 2 and 1 that fits in 80 % of the free memory, accumulated to ten rows an update;
      if not even one fits, one with activation checkpointing. Targets are computed of 32, 16, 6 or 3 rows at once.
    - **what fits**: a step takes weights, 16 bytes a weight of the adapter (4 of itself, its gradient, two moments of
      Adam), 128 MiB for logits, on a CPU 800 MiB for Python and the libraries; and from the first adapted layer on, a
      layer keeps `4·h` numbers and all outputs of its linear modules a token, plus, with float32 weights and products
      in bfloat16, a copy of its weights in 2 bytes. With checkpointing it keeps h numbers a token.

    Args:
        model: Config, or a model, on the meta device too. Weights are not looked at.
        memory: Free bytes of the device; measured by default ([`free_memory`]).
        device: Where the model is trained; the accelerator if there is one, else the CPU.
        row_tokens: Tokens of all texts of a row.
        given: Settings of `OPTIONS` that are given; they are kept, and the others chosen to fit them.

    Raises:
        ValueError: if `given` names a setting that is not chosen here, or there is no memory.
    """
    given = dict(given or {})
    if unknown := sorted(set(given) - set(OPTIONS)):
        raise ValueError(f"`given` names {unknown}, which are not chosen here: use {', '.join(OPTIONS)}.")
    place = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
    memory = free_memory(place) if memory is None else memory
    if memory <= 0:
        raise ValueError(f"`memory` is {memory}: give the free bytes of the device.")
    model = model if isinstance(model, PreTrainedModel) else empty_model(model)
    layers = decoder_layers(model)
    count, hidden = len(layers), model.config.get_text_config().hidden_size
    choices: dict[str, Choice] = {}

    def choose(name: str, value: Any, reason: str) -> Any:
        choices[name] = Choice(given[name], "given") if name in given else Choice(value, reason)
        return choices[name].value

    first, last = min(round(_FIRST * count), count - 1), min(round(_LAST * count), count - 1)
    chosen = choose("lora_layers", f"{first}-{last}", f"from {_FIRST:.0%} to {_LAST:.0%} of {count} layers")
    if chosen == AUTO:
        chosen = str(expected_readout(count))
    first = int(str(chosen).partition("-")[0])
    last = int(str(chosen).rpartition("-")[2])
    into = feed_forward_inputs(layers, hidden)
    why = "what leads into the feed-forward part" if into else "no module leads into a feed-forward part by itself"
    targets = choose("lora_targets", ",".join(into) or "all-linear", why)
    narrow = 2 ** max((hidden // 4).bit_length() - 1, 0)
    why = f"hidden size {hidden}" if narrow < _RANK else "the best found on dev questions of SmolLM2-135M"
    rank = choose("lora_rank", min(_RANK, narrow), why)
    choose("lora_alpha", rank, "as the rank")

    fast = multiplies_in_bfloat16(place)
    bf16 = choose("bf16", fast, f"this {place.type} {'multiplies' if fast else 'does not multiply'} in bfloat16")
    weights = sum(parameter.numel() for parameter in model.parameters())
    names = None if targets == "all-linear" else set(str(targets).split(","))
    adapter = sum(rank * sum(sizes(m)) for layer in layers[first : last + 1] for m in linear(layer, names).values())
    passed = layers[first:]

    def needed(rows: int, dtype: str, checkpointing: bool) -> int:
        size = getattr(torch, dtype).itemsize
        kept = 2 if bf16 else size
        numbers = sum(
            hidden if checkpointing else 4 * hidden + sum(sizes(m)[1] for m in linear(layer).values())
            for layer in passed
        )
        copies = 2 * sum(p.numel() for layer in passed for p in layer.parameters()) if bf16 and size == 4 else 0
        process = _PROCESS if place.type == "cpu" else 0
        return process + _HEAD + weights * size + 16 * adapter + copies + rows * row_tokens * numbers * kept

    usable = int(USABLE * memory)
    if place.type != "cpu" and fast:
        dtype = choose("dtype", "bfloat16", "half the memory, and what the accelerator multiplies in")
    else:
        whole = needed(UPDATE_ROWS, "float32", False) <= usable
        why = "fits" if whole else f"in float32 ten rows do not fit in {shown(usable)}"
        dtype = choose("dtype", "float32" if whole else "bfloat16", why)
    fitting = [rows for rows in _BATCHES if needed(rows, dtype, False) <= usable]
    rows = fitting[0] if fitting else 1
    why = f"{shown(needed(rows, dtype, not fitting))} of {shown(usable)} that may be used"
    rows = choose("per_device_train_batch_size", rows, why)
    choose("gradient_accumulation_steps", max(UPDATE_ROWS // rows, 1), f"{UPDATE_ROWS} rows an update")
    at_once = _BATCHES.get(rows, max(3 * rows, 1))
    choose("per_device_eval_batch_size", at_once, "targets are computed without gradients")
    why = "activations fit" if fitting else "not even the activations of one row fit"
    checkpointing = choose("activation_checkpointing", not fitting, why)
    need = needed(rows, dtype, checkpointing)
    return FittedSettings({name: choices[name] for name in OPTIONS}, needed=need, fits=need <= usable)


def machine_settings(fitted: FittedSettings, device: torch.device) -> dict[str, Choice]:
    """The settings of [`fitting_settings`] with those that go with the device, by name."""
    found = dict(fitted.choices)
    if device.type == "cpu":
        found |= {name: Choice(value, "least time on a CPU") for name, value in _ON_CPU.items()}
        found["bf16_full_eval"] = found["bf16"]
    return found


def objective_settings(
    texts: int,
    longest: int,
    *,
    counterfactual: bool,
    alike: bool = False,
    by_terms: bool = False,
    given: Mapping[str, Any] | None = None,
    attention: Sequence[str] = (),
    depth: int = 0,
) -> dict[str, Choice]:
    """Choose objective, rows, epochs, length and checkpoints by the forget texts.

    The rules:

    - **objective and schedule**: of `OBJECTIVES` that at the readout where every text has `novices`, or that of terms where these
      replace a subject's terms, else that of contexts. A given `objective` decides instead, or a given `novice` or `preset`, or `eta`, `eta_end`, `log_tokens`, `log_strength` or `log_others`, by which log space
      is meant unless `erase_after` is given too. Where stand-ins are alike `state_eta` is 2.5 and `retain_weight` 1.5. For terms the layers are those from `round(.1·depth)` to `round(.3·depth)`.
    - **rows**: in log space 512, as in the recipe: of fewer texts some are repeated, and of more the first are
      taken, which tell of all facts alike ([`facts_texts`]). At the readout as many as there are texts, from 256 to 1024, for terms
      to 1536, with contexts from 128 to 1024.
    - **steps**: ten passes over the rows at the readout, four for terms, but at least 600 steps, two in log space, three with contexts; a given
      `max_steps` decides instead. Fewer steps than one pass are no way to save time, since the targets of rows that are read once are
      computed for nothing.
    - **length**: that of the longest forget text in tokens, rounded up to a multiple of 8, at least 80 and at most 256.
    - **checkpoints**: one after each quarter of the steps, of which the last is kept, so that a run can go on.

    Args:
        texts: Number of forget texts.
        longest: Tokens of the longest.
        counterfactual: Whether every one has `novices`.
        alike: Whether the model reads most facts and their stand-ins alike ([`likeness`]).
        by_terms: Whether `novices` replace a subject's terms.
        given: Settings that are given; none of them is chosen.
        attention: The model's [`attention_modules`], which are adapted at the readout.
        depth: Number of its layers, of which those of terms are chosen.
    """
    given = dict(given or {})
    objective, why = _objective(given, counterfactual, by_terms)
    found = {name: Choice(value, why) for name, value in {"objective": objective, **OBJECTIVES[objective]}.items()}
    if objective == "readout" and alike:
        why_alike = "stand-ins are read alike; the best found on dev questions"
        found |= {name: Choice(value, why_alike) for name, value in _IF_ALIKE.items()}
    if objective == "readout" and attention:
        found["lora_targets"] = Choice(",".join(attention), "attention is what reads the answer out")
    if objective == "terms" and depth:
        layers = f"{round(_TERMS_FIRST * depth)}-{round(_TERMS_LAST * depth)}"
        found["lora_layers"] = Choice(layers, f"from {_TERMS_FIRST:.0%} to {_TERMS_LAST:.0%} of {depth} layers")
        last = str(given.get("lora_layers", layers)).rpartition("-")[2]
        if last != AUTO:
            found["state_layers"] = Choice([int(last)], "the last adapted layer")
    low, high = _ROWS[objective]
    rows = min(max(texts, low), high)
    told = f"{texts} forget texts are there"
    if texts > high:
        told += f", of which the first {high} are read"
        told += "" if objective == "terms" else ", evenly over all facts: as many as in the recipe"
    found["dataset_size"] = Choice(rows, f"{told}, which are repeated up to {low} rows" if texts < low else told)
    if given.get("max_steps", -1) <= 0:
        passes, why = _EPOCHS[objective], "about as many rows as in the recipe of this objective"
        why = "the best found on dev questions" if objective == "terms" else why
        if objective in ("readout", "terms") and rows * passes < _FEWEST_STEPS * UPDATE_ROWS:
            passes = float(-(-_FEWEST_STEPS * UPDATE_ROWS // rows))
            why = f"at least {_FEWEST_STEPS} steps of {UPDATE_ROWS} rows"
        found["num_train_epochs"] = Choice(passes, why)
    low, high = _LENGTHS
    told = f"the longest forget text has {longest} tokens; at most {high}"
    found["max_length"] = Choice(min(max(-(-longest // 8) * 8, low), high), told)
    why = "one after each quarter, the last is kept, so that `--resume` can go on"
    found |= {"save_steps": Choice(0.25, why), "save_total_limit": Choice(1, why)}
    return {name: choice for name, choice in found.items() if name not in given}


def _objective(given: Mapping[str, Any], counterfactual: bool, by_terms: bool) -> tuple[str, str]:
    """The objective by the rule of [`objective_settings`], and why."""
    if "objective" in given:
        return given["objective"], "`objective` is given"
    novice = given.get("novice") or ("contexts" if "preset" in given else None)
    counterfactual = novice == "counterfactual" if novice else counterfactual
    unread = [name for name in ("eta", "eta_end", "log_tokens", "log_strength") if given.get(name)]
    unread += ["log_others"] if given.get("log_others") == "novice" else []
    readout = given.get("erase_after") or given.get("retain_loss") == "states"
    readout = readout or any(name.startswith("state_") for name in given)
    if counterfactual and unread and not readout:
        return "log-space", f"`{unread[0]}` is given, which the readout does not read"
    objective = ("terms" if by_terms else "readout") if counterfactual else "contexts"
    return objective, f"`{'novice' if given.get('novice') else 'preset'}` is given" if novice else _TESTED[objective]


def empty_model(config: PreTrainedConfig, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """The model of a config on the meta device: shapes and types without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)


def linear(layer: nn.Module, names: set[str] | None = None) -> dict[str, nn.Module]:
    """The linear modules of a layer by their path in it, or those whose path ends with one of the names, as PEFT takes them."""
    found = {path: module for path, module in layer.named_modules() if isinstance(module, LINEAR)}
    ends = None if names is None else tuple(f".{name}" for name in names)
    return {path: module for path, module in found.items() if ends is None or f".{path}".endswith(ends)}


def sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear module."""
    rows, columns = module.weight.shape  # GPT-2's kind keeps its matrix the other way round
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def expected_readout(depth: int) -> int:
    """The layer for which memory and time are planned where it is yet to be found: that of SmolLM2-135M in a model of this depth."""
    return min(round(_LAST * depth), depth) - 1


def feed_forward_inputs(layers: nn.ModuleList, hidden: int) -> list[str]:
    """Names of the modules that lead into the feed-forward part, as in the rule of [`fitting_settings`]."""
    found: dict[str, set[tuple[int, int]]] = {}
    for layer in layers:
        for path, module in linear(layer).items():
            if "attn" not in path and "attention" not in path:
                found.setdefault(path.rpartition(".")[2], set()).add(sizes(module))
    # Where the feed-forward part is as wide as the model, what leads out of it looks the same: names tell nothing then.
    return [
        name
        for name, shapes in found.items()
        if any(inputs == hidden <= outputs for inputs, outputs in shapes)
        and all(outputs != hidden for _, outputs in shapes)
    ]


def attention_modules(layers: nn.ModuleList) -> list[str]:
    """Names of the linear modules of attention, such as `"q_proj"`; with the name of what holds them, such as `"attn.c_proj"`, where
    others have the same.
    """
    paths = {path for layer in layers for path in linear(layer)}
    inside = {path for path in paths if "attn" in path or "attention" in path}
    others = {path.rpartition(".")[2] for path in paths - inside}
    return sorted({".".join(path.split(".")[-2 if path.rpartition(".")[2] in others else -1 :]) for path in inside})


def shown(size: float) -> str:
    """Bytes as people read them, such as `"1.25 GB"`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
