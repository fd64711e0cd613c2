"""`merge_erased`: the erasure worked into the weights, as a model of its own."""

import copy
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..fingerprint import is_quantised


def merge_erased(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    output_dir: str | Path,
    max_shard_size: str = "5GB",
) -> Path:
    """Write the full weights of an erased model, with its active adapter merged, and its tokenizer.

    The model itself stays as it is, so for a moment there are two of it in memory. Weights are added in the type of the
    base: in bfloat16 the result is rounded, in float32 it gives the logits of the adapter to about 1e-5.

    Args:
        model (`PeftModel`): Erased model, as [`load_erased`] returns it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        output_dir (`str` or `Path`): New or empty folder.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Size at which the safetensors are split.

    Returns:
        `Path`: the folder, for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        TypeError: if the model has no adapter.
        FileExistsError: if the folder holds something.
        ValueError: if the base is quantised, the adapter can't be merged, or merging would leave NaN in the weights.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"`model` is of type {type(model).__name__}, which has no adapter to merge: give the `PeftModel` of `load_erased`."
        )
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"`output_dir` {output} is not an empty folder: name another one.")
    if is_quantised(model):
        raise ValueError(
            "The base is quantised, and merging would round the erasure away: load the adapter without "
            '`quantization_config`, e.g. `load_erased(..., dtype="bfloat16")`, and merge that.'
        )
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    # Where the base came from is nobody's business, least of all a folder of this machine.
    merged.config._name_or_path = ""
    merged.save_pretrained(output, max_shard_size=max_shard_size)
    processing_class.save_pretrained(output)
    return output
