"""No graph below the first trained layer, whatever gradient checkpointing asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..modeling import decoder_layers


@contextmanager
def no_graph_below(model: nn.Module) -> Iterator[None]:
    """While this holds, what enters the layers requires no gradient, so that the graph begins at the first trained layer.

    With gradient checkpointing, transformers and TRL let the embeddings' output require a gradient, as its reentrant kind
    needs. The other kind does not, and the backward would run all layers below again to no end. Without checkpointing, or
    with a trained weight outside the layers (as in the embeddings), this changes nothing.

    Args:
        model (`nn.Module`): Causal language model, with or without an adapter.
    """
    stack = decoder_layers(model)
    inside = {id(parameter) for parameter in stack.parameters()}
    if any(parameter.requires_grad and id(parameter) not in inside for parameter in model.parameters()):
        yield
        return

    def detach(_, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach()}

    handle = stack[0].register_forward_pre_hook(detach, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def reentrant(args: TrainingArguments) -> bool:
    """Whether gradient checkpointing is of the reentrant kind, which starts from an input that requires a gradient."""
    return bool(args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))
