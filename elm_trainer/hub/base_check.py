"""The check that an adapter meets the weights it was trained on."""

from collections.abc import Mapping

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import logging

from ..fingerprint import base_fingerprint
from .errors import BaseMismatchError


logger = logging.get_logger(__name__)


def check_base(model: PreTrainedModel | PeftModel, expected: Mapping[str, str], base_id: str) -> None:
    """Check that a model has the weights that a fingerprint was taken of.

    A quantised model is compared by the tensors that quantisation leaves alone, and the log says so.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): Model at hand.
        expected (`Mapping[str, str]`): What [`base_fingerprint`] said of the base.
        base_id (`str`): Hub id of that base, for the error.

    Raises:
        BaseMismatchError: if the weights are others, or those of a base that is not quantised cannot all be compared.
        ValueError: if weights were offloaded, and are not there to be read.
    """
    try:
        found = base_fingerprint(model)
    except ValueError as error:
        raise ValueError(f"{error} `allow_mismatch=True` goes on without the comparison.") from error
    compared = "weights" if "weights" in found and "weights" in expected else "unquantized"
    if compared == "unquantized":
        logger.warning(
            f"The base or the one the adapter was trained on is quantised: only its embeddings, norms and biases were "
            f"compared with {base_id}."
        )
    if "weights" in found and "weights" not in expected and found["unquantized"] == expected.get("unquantized"):
        raise BaseMismatchError(
            f"The adapter was published without a hash of all weights of {base_id}, as one is that was trained on a quantised "
            "base: load the base as it was trained, with `quantization_config`, or pass `allow_mismatch=True` to go on with "
            "weights that were compared in part."
        )
    wanted = expected.get(compared)
    if found[compared] == wanted:
        return
    what = "weights"
    if compared == "unquantized" or found["unquantized"] != expected.get("unquantized"):
        what = "embeddings, norms or biases"
    raise BaseMismatchError(
        f"The base model is not {base_id}, which the adapter was trained on: the {what} differ (fingerprint "
        f"`{compared}` is {found[compared][:12]}…, but {str(wanted)[:12]}… is expected). Load that model and revision, "
        "or pass `allow_mismatch=True` to go on with an adapter that nobody measured on this base."
    )
