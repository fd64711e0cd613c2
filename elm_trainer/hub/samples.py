"""What a model wrote, less what must not be published: masked and told, as nobody can take it out at its source."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers.utils import logging

from .answers import MASK
from .documents import Document
from .passages import find_passages
from .readings import readings
from .scan import find_private


logger = logging.get_logger(__name__)
_WRITTEN = ("prompt", "reference", "erased")


def mask_samples(
    report: Mapping[str, Any], *, forget: Iterable[str] = (), names: Collection[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report with secrets, paths, persons and forget passages in its samples masked by `▇▇▇`; each is logged.

    Args:
        report (`Mapping`): Local report; it stays as it is.
        forget (`Iterable[str]`, *optional*): Forget texts. A side of a sample that holds a passage is masked as a whole.
        names (`Collection[str]`, *optional*): Names of persons and machines.

    Returns:
        The report, and those of its samples in which nothing was masked.
    """
    samples = [dict(sample) for sample in report["samples"]]
    texts = {
        (number, side): Document(f"samples[{number}].{side}", sample[side])
        for number, sample in enumerate(samples)
        for side in _WRITTEN
        if isinstance(sample.get(side), str)
    }
    passages = {passage.document.file for passage in find_passages(list(texts.values()), forget)}
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
