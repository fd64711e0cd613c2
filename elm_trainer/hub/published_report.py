"""Report and recipe as they are published: nothing of the machine, no right answers, nothing unsafe in samples."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from enum import Enum
from functools import partial
from types import NoneType
from typing import Any, get_args

from huggingface_hub import HfApi
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging
from trl import SFTConfig

from ..concept import concept_presets
from ..data.benchmarks import is_benchmark
from ..data.questions import Question
from ..data.sources import BUILTIN_PAIRS, BUILTIN_SOURCES
from ..data.user_sources import hub_id, is_hub_id
from ..evaluation.measures import INSIDE, MEASURES
from ..evaluation.report import check_report
from .errors import HubError, named_errors, retried
from .info import BaseModel
from .scan import MASK, find_passages, find_private, mask_answers
from .secrets import Document, readings


logger = logging.get_logger(__name__)
LOCAL_FILE = "(local file)"
PRIVATE_DATASET = "(private data set)"
# Settings that name where texts come from.
SOURCES = ("forget", "retain", "synthetic", "bank", "anchors", "documents", "facts", "near")
# The seed, and fields of TRL's config whose default some method changes.
ALWAYS = ("seed", "learning_rate", "lr_scheduler_type", "max_grad_norm", "max_steps", "per_device_train_batch_size")

# Settings of this machine, its trackers and its Hub account: they do not change what is learned.
_OF_THE_MACHINE = re.compile(
    r"(hub_|push_to_hub|logging_|log_level|log_on_|save_|trackio_|ddp_|fsdp|deepspeed|accelerator_config|parallelism_config).*"
    r"|report_to|run_name|project|disable_tqdm|local_rank|resume.*|overwrite.*|adapter|reference|debug"
    r"|targets_dir|.*_dir|(.*_)?(token|secret|password|key)"
)
_MODULES = r"[A-Za-z_][\w.]*"

# What a value must be to go up. Each gives the public value, or None where it is something else.
Public = Callable[[Any], Any]


def _number_or_flag(value: Any) -> Any:
    # A larger number cannot be a setting, but could be somebody's.
    fits = type(value) in (int, float, bool) and math.isfinite(value) and abs(value) < 1 << 53
    return value if fits else None


def _one_of(*choices: str) -> Public:
    return lambda value: str(value.value if isinstance(value, Enum) else value) if value in choices else None


def _matching(pattern: str) -> Public:
    return lambda value: value if isinstance(value, str) and re.fullmatch(pattern, value) else None


def _or_list(public: Public) -> Public:
    def of_all(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return public(value)
        parts = [public(part) for part in value]
        return None if None in parts else parts

    return of_all


def _mapping(known: Mapping[str, Public]) -> Public:
    """Of a mapping the entries that are known."""

    def of_entries(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return None
        public = {key: known[key](part) for key, part in value.items() if key in known}
        return {key: part for key, part in public.items() if part is not None} or None

    return of_entries


def find_public_sources(api: HfApi, report: Mapping[str, Any]) -> set[str]:
    """Which data sets of the recipe anybody may see, as the Hub says to one who shows no token."""
    given = [report.get("recipe", {}).get(key) or () for key in SOURCES]
    named = {
        part for value in given for part in ([value] if isinstance(value, str) else value) if isinstance(part, str)
    }
    public = set()
    for name in sorted(filter(is_hub_id, named - _built_in())):
        try:
            with named_errors(name, f"Asking whether the data set {name} is public"):
                if not retried(partial(api.dataset_info, hub_id(name), token=False)).private:
                    public.add(name)
        except HubError:
            logger.warning(f"The data set {name} is private, or the Hub did not say: the card does not name it.")
    return public


def _built_in() -> set[str]:
    return {*BUILTIN_SOURCES, *BUILTIN_PAIRS, *concept_presets(), "none"}


def _source_of(public_sources: Collection[str]) -> Public:
    """What was read: built in, or public on the Hub, by its name; of anything else the kind alone."""

    def source(value: Any) -> Any:
        if not isinstance(value, str) or value in _built_in() or value in public_sources:
            return value if isinstance(value, str) else None
        if is_benchmark(value):
            return value.partition(",from=")[0]
        return PRIVATE_DATASET if is_hub_id(value) else LOCAL_FILE

    return source


_DTYPE = _one_of("auto", "float32", "bfloat16", "float16", "float64")
_ATTENTION = _one_of("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_SCHEDULER = "num_cycles power lr_end min_lr min_lr_rate min_lr_ratio num_decay_steps num_stable_steps".split()
_LIGER = "rope swiglu geglu rms_norm layer_norm cross_entropy fused_linear_cross_entropy".split()
# Settings of `examples/erase.py` and of the methods that are numbers or flags.
_NUMBERS = (
    "own_retain dataset_size shares synthetic_size lora_rank lora_alpha lora_dropout evaluate questions dev_every dev_stop keep_best "
    "eta eta_end tau top_k plausibility fact_share log_tokens log_strength log_retain state_weight state_eta state_names state_layers contrast_rows contrast_damping erase_weight erase_after "
    "retain_weight retain_focus consistency_weight contexts_per_sample expert_steps novice_steps teacher_learning_rate "
    "teacher_rank teacher_batch_size precompute_targets precompute_ref_log_probs alpha beta delta faithful layer layers "
    "steering_coefficient steering_scale adaptive relu reinforced_steps"
).split()
_KNOWN: Mapping[str, Public] = {
    **dict.fromkeys(_NUMBERS, _or_list(_number_or_flag)),
    **dict.fromkeys(("dtype", "target_dtype"), _DTYPE),
    "attn_implementation": _ATTENTION,
    "matmul_precision": _one_of("highest", "high", "medium"),
    "characters": _matching(r"\d+-\d+"),
    "lora_layers": _matching(r"\d+(-\d+)?"),
    "lora_targets": _matching(rf"all-linear|{_MODULES}(, ?{_MODULES})*"),
    "target_module": _matching(_MODULES),
    "measures": _or_list(_one_of(*MEASURES, INSIDE)),
    "preset": _one_of("paper", "released"),
    "novice": _one_of("contexts", "counterfactual"),
    "log_others": _one_of("reference", "novice"),
    "objective": _one_of("readout", "terms", "log-space", "contexts"),
    "retain_loss": _one_of("kl", "argmax", "log", "states", "nll"),
    # Fields of TRL's config that hold text or further settings.
    "lr_scheduler_type": _one_of(*SchedulerType),
    "lr_scheduler_kwargs": _mapping(dict.fromkeys(_SCHEDULER, _number_or_flag)),
    "optim": _one_of(*OptimizerNames),
    "optim_args": _matching(r"[a-z]\w{0,20}=-?[\d.e-]{1,20}(,\s*[a-z]\w{0,20}=-?[\d.e-]{1,20})*"),
    "optim_target_modules": _or_list(_matching(rf"all-linear|{_MODULES}")),
    "truncation_mode": _one_of("keep_start", "keep_end"),
    "packing_strategy": _one_of("bfd", "bfd_split", "wrapped"),
    "loss_type": _one_of("nll", "chunked_nll", "dft"),
    "train_sampling_strategy": _one_of("random", "sequential", "group_by_length"),
    "pad_to_multiple_of": lambda value: value if value == "auto" else _number_or_flag(value),
    "eval_strategy": _one_of("no", "steps", "epoch"),
    "include_num_input_tokens_seen": lambda value: (
        _one_of("no", "all", "non_padding")(value) or _number_or_flag(value)
    ),
    "metric_for_best_model": _one_of("loss", "eval_loss"),
    "gradient_checkpointing_kwargs": _mapping({"use_reentrant": _number_or_flag}),
    "activation_checkpointing_kwargs": _mapping({"use_reentrant": _number_or_flag}),
    "liger_kernel_config": _mapping(dict.fromkeys(_LIGER, _number_or_flag)),
    "model_init_kwargs": _mapping({"dtype": _DTYPE, "attn_implementation": _ATTENTION}),
    "dataset_kwargs": _mapping({"skip_prepare_dataset": _number_or_flag}),
}


def mask_samples(
    report: Mapping[str, Any], *, forget: Iterable[str] = (), names: Collection[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report with secrets, paths, persons and forget passages in its samples masked by `▇▇▇`, each of which is logged; and those
    of its samples in which nothing was masked.

    A side of a sample that holds a passage of a forget text is masked as a whole. `names` are those of persons and machines.
    """
    samples = [dict(sample) for sample in report["samples"]]
    texts = {
        (number, side): Document(f"samples[{number}].{side}", sample[side])
        for number, sample in enumerate(samples)
        for side in ("prompt", "reference", "erased")
        if isinstance(sample.get(side), str)
    }
    passages = {document.file for document, _, _ in find_passages(list(texts.values()), forget)}
    for (number, side), document in texts.items():
        if document.file in passages:
            masked, kinds = MASK, ["words in a row of a forget text"]
        else:
            masked, kinds = mask_private(document.text, names)
        if kinds:
            samples[number][side] = masked
            logger.warning(f"{document.file} of the report holds {', '.join(kinds)}, which the model wrote: masked.")
    whole = [new for new, old in zip(samples, report["samples"], strict=True) if new == old]
    return {**report, "samples": samples}, whole


def mask_private(text: str, names: Collection[str] = ()) -> tuple[str, list[str]]:
    """The text with what gives away a secret, a person or a machine masked, and the kinds of what was found."""
    hits = list(find_private(text, names))
    kinds = {hit.kind for hit in hits}
    masked, end = "", 0
    for hit in sorted(hits):
        masked += text[end : hit.start] + MASK * (hit.start >= end and hit.end > end)
        end = max(end, hit.end)
    masked += text[end:]
    # What shows only when escapes are resolved has no place of its own in the text: its lines go as a whole.
    for reading in readings(masked)[1:]:
        for hit in find_private(reading, names):
            kinds.add(hit.kind)
            first, last = reading.count("\n", 0, hit.start), reading.count("\n", 0, hit.end)
            lines = masked.split("\n")
            masked = "\n".join(MASK if first <= number <= last else line for number, line in enumerate(lines))
    return masked, sorted(kinds)


_SHARED = (
    "schema_version", "kind", "figures", "reference_sha256", "erased_sha256", "datasets", "versions", "seconds",
    "peak_memory_bytes", "peak_device_memory_bytes",
)  # fmt: skip
_EVALUATION = (
    *_SHARED, "verdict", "flags", "roles", "shortcuts", "items", "samples", "inside", "harness", "generator", "settings",
    "training_log",
)  # fmt: skip
_ATTACKS = (*_SHARED, "chance", "worst_case", "families", "curves", "attacks", "skipped")

_PATH = re.compile(
    r"(\.{1,2})?/|~|\\\\|file:|[A-Za-z]:[/\\]"
    r"|.*\.(jsonl?|txt|csv|tsv|parquet|ya?ml|gguf|bin|pt|pth|safetensors|jinja|py)$",
    re.IGNORECASE,
)


def published_report(
    report: Mapping[str, Any],
    *,
    base_model: BaseModel,
    method: str,
    attacks: Mapping[str, Any] | None = None,
    questions: Sequence[Question] = (),
    public_sources: Collection[str] = (),
) -> dict[str, Any]:
    """Turn the local reports into the one that is published.

    Only known keys go up, and of the recipe only known settings, each of its own type (see [`published_recipe`]). A source
    that is a file here reads `(local file)`, a data set of the Hub that is not among `public_sources` `(private data set)`:
    number and SHA-256 of the texts stand in `datasets`. Samples lose the right answer,
    and where a model gives it about what was erased, it is masked with `▇▇▇`.

    Args:
        base_model: What the adapter belongs to.
        method: Trainer that made the adapter, such as `"ElmTrainer"`.
        attacks: The attack report on the same models.
        questions: Questions whose aliases of a right answer are masked too.
        public_sources: Ids of data sets on the Hub that anybody may see.

    Returns:
        `dict`: an evaluation report with the further keys `concepts` (`list[str]`), `method`, `base_model` (a `dict` of
        [`BaseModel`]), `recipe` and `attacks` (`None`, or the attack report).

    Raises:
        ValueError: for reports of another kind or schema, an attack report on other models, a report in which nothing
            was erased, or a recipe without a seed.
    """
    check_report(report)
    recipe = report.get("recipe", {})
    banks = [bank for bank, role in report["roles"].items() if role == "erased"]
    # Earlier versions named no concepts, and had one bank for each.
    concepts = list((banks and report.get("concepts", banks)) or recipe.get("concepts") or ())
    if not concepts:
        raise ValueError(
            f"`report` names nothing that was erased (`roles` is {dict(report['roles'])}): measure the erased model on "
            "a suite with a bank of the role 'erased'."
        )
    if "seed" not in recipe:
        raise ValueError(
            f"`recipe` has no `seed` (it has {sorted(recipe)}), so nobody could repeat the training: pass its settings to "
            "`evaluate_erasure` as `details={'recipe': ...}`."
        )
    if attacks is not None:
        check_report(attacks, "attacks", name="The attack report")
        for key in ("reference_sha256", "erased_sha256"):
            if attacks[key] != report[key]:
                raise ValueError(
                    f"`attacks` are on another model than `report`: `{key}` is {attacks[key][:12]} there and "
                    f"{report[key][:12]} in the report. Attack and measure the same adapter."
                )
    published = {key: report[key] for key in _EVALUATION if key in report}
    published["items"] = {
        name: {side: {key: found[key] for key in ("values", "counts")} for side, found in sides.items()}
        for name, sides in report["items"].items()
    }
    aliases = {question.answer: question.aliases for question in questions}
    published["samples"] = [_masked(sample, aliases.get(sample["answer"], ())) for sample in report["samples"]]
    published["training_log"] = [_numbers(row) for row in report.get("training_log") or []]
    for key in ("settings", "datasets"):
        published[key] = _without_paths(published[key])
    return published | {
        "concepts": concepts,
        "method": method,
        "base_model": asdict(base_model),
        "recipe": published_recipe(recipe, base_model, concepts, public_sources),
        "attacks": None if attacks is None else _public_attacks(attacks),
    }


def _masked(sample: Mapping[str, str], aliases: Sequence[str]) -> dict[str, str]:
    # What is to be kept may be told.
    answers = [sample["answer"], *aliases] if sample.get("role", "erased") == "erased" else []
    said = {side: mask_answers(sample[side], answers) for side in ("reference", "erased")}
    return {key: sample[key] for key in ("role", "prompt") if key in sample} | said


def _public_attacks(attacks: Mapping[str, Any]) -> dict[str, Any]:
    public = {key: attacks[key] for key in _ATTACKS if key in attacks}
    public["datasets"] = _without_paths(public["datasets"])
    public["attacks"] = [
        {"name": row["name"], "settings": _without_paths(row["settings"]), "seconds": row["seconds"]}
        # An attack's own words, such as a suffix that it found, may hold what was erased; its numbers cannot.
        | {"details": {figure: _numbers(details) for figure, details in row["details"].items()}}
        for row in attacks["attacks"]
    ]
    public["skipped"] = _without_paths(public["skipped"])
    return public


def _numbers(details: Mapping[str, Any]) -> dict[str, int | float]:
    return {key: value for key, value in details.items() if isinstance(value, (int, float))}


def _without_paths(value: Any) -> Any:
    """The value with every string that is a path on this machine replaced."""
    if isinstance(value, Mapping):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(part) for part in value]
    return LOCAL_FILE if isinstance(value, str) and _PATH.match(value) else value


def published_recipe(
    recipe: Mapping[str, Any], base_model: BaseModel, concepts: Sequence[str], public_sources: Collection[str] = ()
) -> dict[str, Any]:
    """The settings of a training as they go up.

    Fields at TRL's default and settings of the machine are left out. So are fields that nobody here knows, and values of
    another type than their field's, both with a warning that names them: what a stranger reads is what is listed here.
    Numbers and flags that the config of a custom method declares are known once that method is imported. `base_model` stands
    in for the model that was trained on, and `concepts` name the output folder. A data set on the Hub that is not among
    `public_sources` reads `(private data set)`, since its name may say what nobody should know.
    """
    known = {
        **_declared(),
        **_KNOWN,
        **dict.fromkeys((*SOURCES, "chat_template_path"), _or_list(_source_of(public_sources))),
        "concepts": _or_list(_one_of(*concepts, *concept_presets())),
        # Without keywords, which may be private.
        "concept": lambda value: _one_of(*concepts)(str(value).partition(":")[0].strip()),
    }
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(SFTConfig)
        if field.name not in ALWAYS
    }
    replaced = {"model", "model_revision", "gguf_file", "output_dir"}
    public: dict[str, Any] = {}
    left_out = []
    for name, value in recipe.items():
        of_the_machine = name in replaced or _OF_THE_MACHINE.fullmatch(name)
        if of_the_machine or value is None or (name in defaults and value == defaults[name]):
            continue
        found = known[name](value) if name in known else None
        if found is None or (isinstance(value, Mapping) and len(found) < len(value)):
            left_out.append(name)
        if found is not None:
            public[name] = found
    if left_out:
        logger.warning(
            f"Settings of the recipe that are not published, being unknown or of another type than their own: "
            f"{', '.join(sorted(left_out))}."
        )
    public |= {"model": base_model.id, "model_revision": base_model.revision}
    if base_model.gguf_file is not None:
        public["gguf_file"] = base_model.gguf_file
    names = (re.sub(r"[^\w-]+", "-", concept).strip("-") for concept in concepts)
    return public | {"output_dir": "outputs/" + "-".join(names)}


def _declared() -> dict[str, Public]:
    """The numbers and flags among the fields of TRL's config and of all configs derived from it."""
    configs: list[type[SFTConfig]] = [SFTConfig]
    found: dict[str, Public] = {}
    for config in configs:
        configs += config.__subclasses__()
        for field in fields(config):
            types = set(get_args(field.type)) or {field.type}
            if types <= {int, float, bool, NoneType}:
                found[field.name] = _number_or_flag
    return found
