"""The erased model and its base as they are at hand, and the folder that is published, all but its card."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from ..attacks.report import plot_attacks
from ..evaluation.inside import plot_inside
from ..evaluation.tables import plot_report
from ..files import RUN_FILE, file_sha256, write_json
from ..fingerprint import adapter_fingerprint, base_fingerprint
from ..modeling import evaluating, load_model_and_tokenizer
from .errors import BaseMismatchError, ReloadError, UnsafeAdapterError, named_errors, retried
from .info import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ATTACKS_PLOT,
    CARD,
    INFO_FILE,
    INSIDE_PLOT,
    REPORT,
    REPORT_PLOT,
    TOKENIZER_FILES,
    BaseModel,
    ErasureInfo,
    Probe,
    check_base,
)
from .safety import check_folder, check_tensors, holds_embeddings
from .untrusted import read_json


if TYPE_CHECKING:
    from .publish import CardDetails


logger = logging.get_logger(__name__)
_ADAPTER_NAME = "staged"  # while it is compared with the one at hand


@contextmanager
def erased_model(
    adapter: str | Path,
    report: Mapping[str, Any],
    model: str | PreTrainedModel | PeftModel | None,
    processing_class: PreTrainedTokenizerBase | None,
) -> Iterator[tuple[PeftModel, PreTrainedTokenizerBase]]:
    """The erased model and its tokenizer, from the model that [`publish_adapter`] was given, or that the report names."""
    recipe, at = report.get("recipe", {}), {}
    if model is None:
        model = recipe.get("model")
        at = {"revision": recipe.get("model_revision"), "gguf_file": recipe.get("gguf_file")}
        if model is None:
            raise ValueError("`model` is None, and the report has no recipe that names it: pass the base.")
    if isinstance(model, str):
        model, processing_class = load_model_and_tokenizer(model, dtype=recipe.get("dtype", "auto"), **at)
    elif processing_class is None:
        raise ValueError("`processing_class` is None: pass the tokenizer of `model`.")
    if isinstance(model, PeftModel):
        yield model, processing_class
        return
    erased = PeftModel.from_pretrained(model, str(adapter))
    try:
        yield erased, processing_class
    finally:
        erased.unload()  # the caller's base is left without the adapter


def find_base(api: HfApi, erased: PeftModel, details: "CardDetails") -> BaseModel:
    """What the base of an adapter is; the Hub is asked for what `details` does not say of it."""
    base_model = details.base_model or erased.get_base_model().config._name_or_path
    revision, license = details.base_revision, details.license
    if not details.base_model and (not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) or Path(base_model).exists()):
        raise ValueError(
            f"`base_model` is None, and the adapter's base was loaded from {base_model!r}, which is not a Hub id: "
            "give the Hub id of the same weights."
        )
    if license is None or revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
        with named_errors(base_model, f"Reading about the base {base_model}"):
            info = retried(lambda: api.model_info(base_model, revision=revision))
        revision = info.sha
        license = license or (info.card_data.license if info.card_data else None)
        if license is None:
            raise ValueError(f"`license` is None, and {base_model} states none: say under which the adapter goes.")
    assert revision is not None
    return BaseModel(base_model, revision, base_fingerprint(erased), license, details.gguf_file)


def check_hub_base(
    erased: PeftModel, base: BaseModel, token: str | bool | None
) -> tuple[PreTrainedTokenizerBase, BaseModel]:
    """Hold the base on the Hub to the fingerprint of the one at hand, and return its tokenizer and what it is.

    Where tokens were added, the one at hand has further rows, which the adapter's file brings along.
    """
    # Loaded even where the one at hand came from the Hub: transformers does not keep which commit that was.
    with named_errors(base.id, f"Loading the base {base.id}"):
        hub_model, hub_tokenizer = load_model_and_tokenizer(
            base.id, revision=base.revision, gguf_file=base.gguf_file, token=token if isinstance(token, str) else None
        )
    rows = hub_model.get_input_embeddings().weight.shape[0]
    if rows < erased.get_base_model().get_input_embeddings().weight.shape[0]:
        base = replace(base, fingerprint=base_fingerprint(erased, rows))
    try:
        check_base(hub_model, base.fingerprint, base.id)
    except BaseMismatchError as error:
        raise BaseMismatchError(
            f"`base_model` is {base.id!r} at {base.revision[:8]}, whose weights are not those of `model` (from "
            f"{erased.get_base_model().config._name_or_path!r}): name the repository, `base_revision` and `gguf_file` "
            "that they came from."
        ) from error
    return hub_tokenizer, base


def stage_adapter(
    adapter: str | Path,
    report: Mapping[str, Any],
    *,
    output_dir: str | Path,
    verification: Sequence[Probe] = (),
    base_tokenizer: PreTrainedTokenizerBase | None = None,
    allowed: Mapping[str, str] | None = None,
) -> Path:
    """Write the folder that goes up, all but its card.

    The same adapter and reports give the same bytes. Written beside `output_dir` and moved there when whole; an earlier
    staged folder is replaced, save for a `README.md` in it. The adapter's own folder is only read.

    Args:
        report: As it is published, see [`published_report`].
        verification: What `load_erased(..., verify=True)` runs again.
        base_tokenizer: The base's own tokenizer, needed where the adapter's folder holds one: that goes up where it behaves
            differently (see [`tokenizer_changed`]).
        allowed: Reasons why findings of the scan may be published, by their ids.

    Raises:
        ValueError: if the report is on another adapter, if the folder holds no single adapter, or where something that is
            needed is missing.
        UnsafeAdapterError: for weights in a pickle, a weights file that cannot be read, or what [`load_erased`] would
            refuse, such as an adapter other than a plain LoRA or a report that is too large.
        FileExistsError: if `output_dir` holds something else than an earlier staged folder.
    """
    adapter, output = Path(adapter), Path(output_dir)
    base_model = BaseModel(**report["base_model"])
    _check_output(output, adapter)
    config, tensors = _read_adapter(adapter)
    _check_measured(tensors, config, report)
    tokenizer = _changed_tokenizer(adapter, base_tokenizer)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        staged = Path(scratch) / "staged"
        staged.mkdir()
        write_json(staged / ADAPTER_CONFIG, _published_config(config, base_model))
        (staged / ADAPTER_WEIGHTS).write_bytes(save(dict(sorted(tensors.items())), metadata={"format": "pt"}))
        write_json(staged / REPORT, report)
        plot_report(report, staged / REPORT_PLOT)
        if report["attacks"] is not None:
            plot_attacks(report["attacks"], staged / ATTACKS_PLOT)
        if report["inside"] is not None:
            plot_inside(report["inside"], staged / INSIDE_PLOT)
        if tokenizer is not None:
            saved = Path(scratch) / "tokenizer"
            tokenizer.save_pretrained(saved)
            for name in TOKENIZER_FILES:
                if (saved / name).exists():
                    shutil.copyfile(saved / name, staged / name)
        ErasureInfo(
            concepts=report["concepts"],
            method=report["method"],
            base_model=base_model,
            recipe=report["recipe"],
            seed=report["recipe"]["seed"],
            versions=report["versions"],
            files={path.name: file_sha256(path) for path in sorted(staged.iterdir())},
            verification=list(verification),
            allowed=dict(sorted((allowed or {}).items())),
        ).write(staged)
        try:
            check_folder(staged)
        except UnsafeAdapterError as error:
            raise UnsafeAdapterError(
                f"`load_erased` would refuse what is to be published ({error}). Where it is the report that is too large, "
                "which has a line for each question and metric, measure fewer of them."
            ) from error
        if (output / CARD).exists():
            shutil.copyfile(output / CARD, staged / CARD)
        _move_into_place(staged, output, Path(scratch) / "replaced")
    return output


def check_reload(erased: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, probes: Sequence[Probe]) -> None:
    """Raise `ReloadError` unless the staged adapter gives the logits of the one at hand, bit for bit."""
    weights, config, base = folder / ADAPTER_WEIGHTS, read_json(folder / ADAPTER_CONFIG), erased.get_base_model()
    try:
        check_tensors(weights, config, base)
    except UnsafeAdapterError:
        # Where tokens were added, PEFT saves the embeddings along.
        if not holds_embeddings(weights, base):
            raise
        check_tensors(weights, config, base, embeddings=True)
    texts = ["Once upon a time there was a town.", *(probe.prompt + probe.answer for probe in probes[:3])]
    batches = [tokenizer(text, return_tensors="pt").to(erased.device) for text in texts]
    active = erased.active_adapter
    with evaluating(erased), torch.inference_mode():
        before = [erased(**batch).logits for batch in batches]
        erased.load_adapter(str(folder), _ADAPTER_NAME)
        try:
            erased.set_adapter(_ADAPTER_NAME)
            differences = [
                (erased(**batch).logits - logits).abs().max() for batch, logits in zip(batches, before, strict=True)
            ]
        finally:
            erased.set_adapter(active)
            erased.delete_adapter(_ADAPTER_NAME)
    if largest := max(difference.item() for difference in differences):
        raise ReloadError(
            f"The staged adapter gives other logits than the one to be published (by up to {largest:.3g}): the folder "
            "named by `adapter` is not what `model` carries; save it again."
        )


def _check_output(output: Path, adapter: Path) -> None:
    there, source = output.resolve(), adapter.resolve()
    if there == source or there in source.parents or source in there.parents:
        raise ValueError(
            f"`output_dir` is {output}, and the adapter lies in {adapter}, which must stay as it is: name a folder "
            "outside it."
        )
    if output.exists() and not (output.is_dir() and ((output / INFO_FILE).exists() or not any(output.iterdir()))):
        raise FileExistsError(
            f"`output_dir` is {output}, which holds something else than an earlier staged adapter (no {INFO_FILE}): "
            "name another folder, or empty this one."
        )


def _read_adapter(adapter: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    below = sorted(path.parent.name for path in adapter.glob(f"*/{ADAPTER_CONFIG}"))
    others = [name for name in below if not name.startswith("checkpoint-")]
    if not (adapter / ADAPTER_CONFIG).is_file():
        found = (
            f"these folders in it do: {', '.join(below)}; name one of them" if below else "name an adapter's folder"
        )
        raise ValueError(f"`adapter` is {adapter}, which has no {ADAPTER_CONFIG}: {found}.")
    if others:
        raise ValueError(
            f"`adapter` is {adapter}, which holds further adapters beside its own ({', '.join(others)}), and nobody can "
            "tell which of them the report measured: save the one to publish into a folder of its own."
        )
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UnsafeAdapterError(
            f"{adapter} has no {ADAPTER_WEIGHTS}, and weights in a pickle can run code: save the adapter again with "
            "`save_pretrained`."
        )
    try:
        # Not mapped into memory: a trainer that writes the file meanwhile would change what was checked.
        tensors = load((adapter / ADAPTER_WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise UnsafeAdapterError(
            f"{adapter / ADAPTER_WEIGHTS} is not a safetensors file ({error}): save the adapter again."
        ) from error
    return json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")), tensors


def _check_measured(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Raise unless the report is on these tensors, or on what PEFT makes of half-precision ones when it loads them."""
    half = (torch.float16, torch.bfloat16)
    loaded = {name: tensor.float() if tensor.dtype in half else tensor for name, tensor in tensors.items()}
    measured = report.get("erased_sha256")
    found = adapter_fingerprint(tensors)
    if measured in (found, adapter_fingerprint(loaded)):
        return
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.get("peft_type"), "")
    foreign = [name for name in sorted(tensors) if prefix not in name]
    also = f" (the file also holds {len(foreign)} tensors without {prefix!r}, such as {foreign[0]})" if foreign else ""
    raise ValueError(
        f"`report` is on another model than `adapter`: `erased_sha256` is {str(measured)[:12]} in the report and "
        f"{found[:12]} of the adapter{also}. Measure this adapter, or name the one that was measured."
    )


def method_of(adapter: Path) -> str:
    """The trainer that made an adapter, as `erasure_run.json` in its folder or the one above names it."""
    for folder in (adapter, adapter.resolve().parent):
        if (folder / RUN_FILE).is_file():
            return str(json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["method"])
    raise ValueError(f"`method` is None, and neither {adapter} nor the folder above holds {RUN_FILE}: pass `method`.")


def _published_config(config: Mapping[str, Any], base_model: BaseModel) -> dict[str, Any]:
    own = {
        "base_model_name_or_path": base_model.id,
        "revision": base_model.revision,
        "inference_mode": True,
        # Without a task PEFT notes which library to import, which nobody should do for a stranger.
        "task_type": config.get("task_type") or "CAUSAL_LM",
        "auto_mapping": None,
    }
    known = {field.name for field in fields(LoraConfig)}
    # What PEFT does not know it does not read either.
    if unknown := sorted(config.keys() - known):
        logger.warning(
            f"Fields of {ADAPTER_CONFIG} that are not published, as PEFT knows none of the name: {', '.join(unknown)}."
        )
    # PEFT keeps names of modules as sets, and writes them in an order that changes from run to run.
    names = {
        key: sorted(config[key])
        for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
        if isinstance(config.get(key), list)
    }
    return dict(sorted(({key: config[key] for key in config.keys() & known} | names | own).items()))


def _changed_tokenizer(adapter: Path, base: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    if not (adapter / "tokenizer_config.json").is_file():
        return None
    if base is None:
        raise ValueError(
            f"`base_tokenizer` is None, but {adapter} holds a tokenizer, which must go up if it is not the base's own: "
            "pass the base's."
        )
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    return tokenizer if tokenizer_changed(tokenizer, base) else None


def tokenizer_changed(tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn some text into other tokens, or some chat into other text.

    Compared are vocabulary and rules, special tokens, and the chat template. Padding with one of the
    base's tokens does not count, as training sets one where the base has none and no model sees it; nor do padding side,
    truncation and the longest length, which belong to a call.
    """
    return _behavior(tokenizer) != _behavior(base)


def _behavior(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules["padding"] = rules["truncation"] = None
    else:
        added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "added": added}
    return {
        "rules": rules,
        "special": {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"},
        "extra": sorted(map(str, tokenizer.extra_special_tokens)),
        "chat_template": tokenizer.chat_template,
    }


def _move_into_place(staged: Path, output: Path, replaced: Path) -> None:
    if output.exists():
        os.rename(output, replaced)
    try:
        os.rename(staged, output)
    except OSError:
        if replaced.exists():
            os.rename(replaced, output)
        raise
