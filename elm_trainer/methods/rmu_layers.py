"""The layers and modules that RMU trains."""

from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling import layer_stack


def check_layer(model: nn.Module, layer: int) -> None:
    """Raise `ValueError` unless the model has the layer ℓ."""
    owner, name = layer_stack(model)
    depth = len(getattr(owner, name))
    if layer >= depth:
        raise ValueError(
            f"`layer` is {layer}, but the model has the layers 0 to {depth - 1}: choose among these (the paper's "
            f"are a quarter of the way up, which would be {depth // 4})."
        )


def down_projections(model: nn.Module, layers: Sequence[int], target_module: str | None) -> dict[str, nn.Module]:
    """The modules whose weight RMU trains, by name.

    Args:
        model: Model, with or without an adapter.
        layers: Layers that the model has.
        target_module: Name of the module in a layer.

    Raises:
        ValueError: if a layer lacks `target_module`, or, where that is left out, none or several of its linear modules
            could be meant.
    """
    owner, name = layer_stack(model)
    stack = getattr(owner, name)
    prefix = next(path for path, module in model.named_modules() if module is stack)
    width = model.config.get_text_config().hidden_size
    found: dict[str, nn.Module] = {}
    for index in layers:
        shapes = {}  # Input and output size of each linear module.
        for path, module in stack[index].named_modules():
            if isinstance(module, nn.Linear):
                shapes[path] = (module.in_features, module.out_features)
            elif isinstance(module, Conv1D):
                shapes[path] = (module.nx, module.nf)
        widest = max((inputs for inputs, outputs in shapes.values() if outputs == width), default=0)
        paths = [path for path, shape in shapes.items() if shape == (widest, width)]
        if target_module is not None:
            paths = [path for path in shapes if path == target_module]
        if len(paths) != 1:
            wanted = f"names no linear module of layer {index}" if target_module else f"fits {paths or 'none'}"
            raise ValueError(
                f"`target_module` is {target_module!r}, which {wanted}; there are {sorted(shapes)}: name one."
            )
        found[f"{prefix}.{index}.{paths[0]}"] = stack[index].get_submodule(paths[0])
    return found


def first_trained_layer(model: nn.Module, layer: int) -> int:
    """Lowest layer with a trained weight; raises `ValueError` if others than those of layers 0 to ℓ are trained."""
    owner, name = layer_stack(model)
    layers = getattr(owner, name)[: layer + 1]
    trained = [any(parameter.requires_grad for parameter in part.parameters()) for part in layers]
    reached = {id(parameter) for parameter in layers.parameters()}
    outside = [
        path
        for path, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in reached
    ]
    if outside:
        raise ValueError(
            f"`peft_config` (or the model's adapter) trains {len(outside)} tensors outside the layers 0 to {layer}, "
            f"which the loss at `layer={layer}` does not reach, such as {outside[0]!r}: use "
            f"`rmu_lora(model, args)`, or a list of `target_modules` with `layers_to_transform=list(range({layer + 1}))`."
        )
    return trained.index(True)
