"""A base quantised to four bits that an adapter is trained on."""

from torch import nn
from transformers.utils import is_bitsandbytes_available


def keep_differentiable(model: nn.Module) -> None:
    """Let gradients pass the four-bit layers of bitsandbytes after the model was evaluated, as its reference is.

    On CPUs with AVX512-BF16, a forward in evaluation mode packs a layer's weights for a kernel that has no backward: from
    then on training would go on without the gradients that pass the layer.

    Raises:
        ValueError: if a layer is packed already.
    """
    if not is_bitsandbytes_available():
        return
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            # Internal to bitsandbytes, which has no setting for it; tests/methods/test_precision.py fails when it moves.
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"`model` was evaluated on the CPU, which packed the four-bit weights of {name!r} so that no gradient "
                    "passes: load it anew, and evaluate it after the trainer is made."
                )
