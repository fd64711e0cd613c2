"""Representation Misdirection for Unlearning (RMU, arXiv 2403.03218): config and trainer."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from ..head import keep_positions
from ..modeling import LINEAR, decoder_layers, evaluating, layer_stack, reentrant
from ..objectives import text_mean
from .base import ErasureTrainer
from .config import ErasureConfig
from .forward import run_packed, upcast, weighted_batches
from .validation import named_datasets


CONTROL_VECTORS_FILE = "control_vectors.safetensors"


@dataclass
class RmuConfig(ErasureConfig):
    r"""
    Configuration class for the [`RmuTrainer`]: its parameters beside those of [`~trl.SFTConfig`].
    The defaults are the published ones for zephyr-7b.

    Parameters:
        layer (`int`, *optional*, defaults to `7`): Layer ℓ whose output is steered; no layer above it is run. The
            paper takes a quarter of the depth: 7 of the 32 layers of zephyr-7b and Mixtral, 15 of the 60 of Yi-34B.
        layers (`list[int]`, *optional*): Layers whose down projection is trained when there is no adapter. Defaults to
            ℓ−2, ℓ−1 and ℓ.
        target_module (`str`, *optional*): Name of the down projection within a layer, such as `"mlp.down_proj"`.
            Defaults to the linear module that maps to the hidden size from the widest input.
        steering_coefficient (`float`, *optional*, defaults to `6.5`): Coefficient c: the norm that hidden states of
            forget text are steered to. The paper has 6.5 for zephyr-7b and 300 for Mixtral and Yi-34B; below the norm
            that the layer's states have anyway, RMU hardly works.
        adaptive (`bool`, *optional*, defaults to `False`): Adaptive RMU (arXiv 2408.06223): c is `steering_scale`
            times the norm of the reference's state of the same token, in place of `steering_coefficient`.
        steering_scale (`float`, *optional*, defaults to `5.0`): Scale s of the adaptive coefficient.
        erase_weight (`float`, *optional*, defaults to `1.0`): Weight of the erase term. A weight of 0 skips a term's
            work altogether.
        retain_weight (`float`, *optional*, defaults to `1200.0`): Weight α of the retain term.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `5e-5` instead of `2e-5`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `max_grad_norm`: Defaults to `0.0` (no clipping) instead of `1.0`.
    > - `max_steps`: Defaults to `150` instead of `-1`, which goes by `num_train_epochs`.
    > - `per_device_train_batch_size`: Defaults to `4` instead of `8`.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate scheduler type to use."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Maximum gradient norm; 0 does not clip."})
    max_steps: int = field(default=150, metadata={"help": "Updates; -1 goes by `num_train_epochs`."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "The batch size per device for training."})

    layer: int = field(default=7, metadata={"help": "Layer whose output is steered."})
    layers: list[int] | None = field(default=None, metadata={"help": "Layers trained when there is no adapter."})
    target_module: str | None = field(default=None, metadata={"help": "Down projection within a layer."})
    steering_coefficient: float = field(default=6.5, metadata={"help": "Norm that forget states are steered to."})
    adaptive: bool = field(default=False, metadata={"help": "Make that norm a multiple of the reference's."})
    steering_scale: float = field(default=5.0, metadata={"help": "That multiple."})
    erase_weight: float = field(default=1.0, metadata={"help": "Weight of the erase term."})
    retain_weight: float = field(default=1200.0, metadata={"help": "Weight of the retain term."})

    _rules = {"at least 0": ("layer",), "above 0": ("steering_coefficient", "steering_scale")}

    def __post_init__(self):
        super().__post_init__()
        if self.layers is None:
            self.layers = list(range(max(self.layer - 2, 0), self.layer + 1))
        if not self.layers or not all(0 <= layer <= self.layer for layer in self.layers):
            raise ValueError(
                f"`layers` is {self.layers}, but the loss at `layer={self.layer}` trains layers 0 to {self.layer}: "
                "choose among these."
            )


def control_vectors(concepts: Iterable[str], width: int, seed: int) -> dict[str, torch.Tensor]:
    """The directions u that forget states are steered to, `[hidden]` in float32: uniform[0, 1)^d, normalized (arXiv
    2403.03218, section 4). A concept's vector does not depend on which others there are.
    """
    vectors = {}
    for concept in concepts:
        digest = hashlib.sha256(f"{seed}-{concept}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        vector = torch.rand(width, generator=generator)
        vectors[concept] = vector / vector.norm()
    return vectors


def misdirection_loss(hidden: torch.Tensor, control: torch.Tensor, coefficient: float | torch.Tensor) -> torch.Tensor:
    """`MSE(h_θ(forget), c·u)` per token, `[tokens]` (arXiv 2403.03218, forget loss of section 4).

    Args:
        hidden: States of the trained model at layer ℓ, `[tokens, hidden]`.
        control: u of each token's concept, `[tokens, hidden]`.
        coefficient: c, one for all or one per token `[tokens, 1]`.
    """
    return (upcast(hidden) - upcast(coefficient * control)).square().mean(-1)


def retention_loss(hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`MSE(h_θ(retain), h_ref(retain))` per token, `[tokens]` (arXiv 2403.03218, retain loss of section 4), for states at
    layer ℓ of the trained model and of the reference, `[tokens, hidden]`.
    """
    return (upcast(hidden) - upcast(reference)).square().mean(-1)


def adaptive_coefficient(reference: torch.Tensor, scale: float) -> torch.Tensor:
    """`c = s·‖h_ref(forget)‖` per token, `[tokens, 1]`, for states `[tokens, hidden]` of the reference at layer ℓ (arXiv
    2408.06223, loss of Adaptive RMU).

    Its released code takes one mean over the tokens of the first batch, padding included; the paper's formula, which
    this is, gives each token its own coefficient.
    """
    return scale * upcast(reference).norm(dim=-1, keepdim=True)


def rmu_lora(model: PreTrainedModel, args: RmuConfig, *, rank: int = 16, **options: Any) -> LoraConfig:
    """LoRA on the matrices of a model without an adapter that `args.layers` and `args.target_module` name. The rank is also its
    alpha, unless `options`, other fields of [`~peft.LoraConfig`], say otherwise.

    Raises:
        ValueError: if the model lacks the layer or the module.
    """
    _check_layer(model, args.layer)
    projections = _down_projections(model, args)
    defaults = {
        "lora_alpha": rank,
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in projections.values()),
    }
    return LoraConfig(r=rank, target_modules=sorted(projections), **(defaults | options))


def _check_layer(model: nn.Module, layer: int) -> None:
    """Raise `ValueError` unless the model has the layer ℓ."""
    depth = len(decoder_layers(model))
    if layer >= depth:
        raise ValueError(
            f"`layer` is {layer}, but the model has the layers 0 to {depth - 1}: choose among these (the paper's "
            f"are a quarter of the way up, which would be {depth // 4})."
        )


def _down_projections(model: nn.Module, args: RmuConfig) -> dict[str, nn.Module]:
    """The modules whose weight is trained, by name; raises `ValueError` where none or several could be meant."""
    stack, target = decoder_layers(model), args.target_module
    prefix = next(path for path, module in model.named_modules() if module is stack)
    width = model.config.get_text_config().hidden_size
    found: dict[str, nn.Module] = {}
    for index in args.layers or ():
        modules = {path: module for path, module in stack[index].named_modules() if isinstance(module, LINEAR)}
        shapes: dict[str, Any] = {
            path: (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
            for path, module in modules.items()
        }
        widest = max((inputs for inputs, outputs in shapes.values() if outputs == width), default=0)
        paths = [path for path in shapes if (shapes[path] == (widest, width) if target is None else path == target)]
        if len(paths) != 1:
            wanted = f"names no linear module of layer {index}" if target else f"fits {paths or 'none'}"
            raise ValueError(f"`target_module` is {target!r}, which {wanted}; there are {sorted(shapes)}: name one.")
        found[f"{prefix}.{index}.{paths[0]}"] = modules[paths[0]]
    return found


def _first_trained_layer(model: nn.Module, layer: int) -> int:
    """Lowest layer with a trained weight; raises `ValueError` if others than those of layers 0 to ℓ are trained."""
    layers = decoder_layers(model)[: layer + 1]
    reached = set(layers.parameters())
    outside = [path for path, weight in model.named_parameters() if weight.requires_grad and weight not in reached]
    if outside:
        raise ValueError(
            f"`peft_config` (or the model's adapter) trains {len(outside)} tensors outside the layers 0 to {layer}, "
            f"which the loss at `layer={layer}` does not reach, such as {outside[0]!r}: use "
            f"`rmu_lora(model, args)`, or a list of `target_modules` with `layers_to_transform=list(range({layer + 1}))`."
        )
    return next(i for i, part in enumerate(layers) if any(weight.requires_grad for weight in part.parameters()))


class RmuTrainer(ErasureTrainer):
    """Trainer for Representation Misdirection for Unlearning (RMU, arXiv 2403.03218).

    `Loss = λe·MSE(h_θ(forget), c·u) + α·MSE(h_θ(retain), h_ref(retain))`, each the mean over texts of the mean over
    their tokens, with h the output of layer ℓ and u one fixed random direction per concept. The official code averages
    over padding too; here padding has no part. Layers above ℓ are not run.

    Without an adapter it trains the down projections of `args.layers` as full weights, and freezes the rest; the
    reference is the same model with the former matrices put back. With `peft_config` (see [`rmu_lora`]) or a model that
    carries an adapter it trains that. The control vectors are saved beside every checkpoint, in
    `control_vectors.safetensors`, and restored on resuming.

    Takes the arguments of [`~trl.SFTTrainer`] and raises what [`ErasureTrainer`] raises.

    Raises:
        ValueError: if the model lacks the layer or the module, the adapter lies outside the layers that are run, or
            full weights are to be trained where they lie in shards (FSDP, DeepSpeed ZeRO-3).
    """

    _name = "RMU"
    _config_class = RmuConfig
    _needs_adapter = False
    args: RmuConfig

    def set_up(self):
        args = self.args
        # Reference matrices in place of the trained ones; none where an adapter is trained.
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        if not isinstance(self.model, PeftModel):
            if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
                raise ValueError(
                    "`peft_config` is None under FSDP or DeepSpeed ZeRO-3, which cut the weights into shards, so that the "
                    "reference's cannot be put back: pass `peft_config=rmu_lora(model, args)`."
                )
            self.model.requires_grad_(False)
            for module in _down_projections(self.model, args).values():
                module.weight.requires_grad_(True)
                self._kept.append((module.weight, module.weight.detach().clone()))
        self._stack = layer_stack(self.model)
        self._first_layer = _first_trained_layer(self.model, args.layer)
        datasets = named_datasets(self.train_dataset, self.eval_dataset).values()
        concepts = sorted({name for dataset in datasets for name in dataset.unique("concept")})
        width = self.model.config.get_text_config().hidden_size
        self._set_control_vectors(control_vectors(concepts, width, args.seed))
        self.data_collator = partial(_with_concepts, self.data_collator, concepts)

    def check_given(self, model, args, datasets, data_collator):
        _check_layer(model, args.layer)

    def packed_together(self):
        step = super().packed_together()[0]
        return [step, *[("retain",)] * (not self.args.adaptive and "retain" in step)]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, weights = self.args, {"erase": self.args.erase_weight, "retain": self.args.retain_weight}
        batches = weighted_batches(inputs, weights)
        with self.reference(model):
            reference = self.hidden_states(
                model, {term: batch for term, batch in batches.items() if term == "retain" or args.adaptive}
            )
        hidden = self.hidden_states(model, batches)
        losses = {}
        if "erase" in hidden:
            coefficient: float | torch.Tensor = args.steering_coefficient
            if args.adaptive:
                coefficient = adaptive_coefficient(reference["erase"], args.steering_scale)
            control = self._control[batches["erase"]["concept"]]  # [tokens, hidden]
            losses["erase"] = misdirection_loss(hidden["erase"], control, coefficient)
        if "retain" in hidden:
            losses["retain"] = retention_loss(hidden["retain"], reference["retain"])
        terms = {
            term: text_mean(values, batches[term]["text"], len(batches[term]["lengths"]))
            for term, values in losses.items()
        }
        loss = self.weigh(terms, weights)
        return (loss, None) if return_outputs else loss

    def hidden_states(self, model: nn.Module, batches: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The output of layer ℓ for each sub-batch's tokens, `[tokens, hidden]`, text after text, from one packed forward up
        to that layer. Without sub-batches nothing is run.
        """
        if not batches:
            return {}
        parts = list(batches.values())
        packing = self.packed.pack(model, parts)
        offsets = accumulate((batch["input_ids"].numel() for batch in parts), initial=0)
        places = [batch["tokens"] + offset for batch, offset in zip(parts, offsets, strict=False)]
        # The head is run on no position at all: nobody reads logits.
        head, nowhere = self.accelerator.unwrap_model(model).get_output_embeddings(), packing.slots.new_empty(0)
        with self._up_to_layer() as output, keep_positions(head, nowhere):
            run_packed(model, parts, packing)
        states = output[0].flatten(0, 1)[packing.slots[torch.cat(places)]]
        return dict(zip(batches, states.split([len(place) for place in places]), strict=True))

    @contextmanager
    def _up_to_layer(self) -> Iterator[list[torch.Tensor]]:
        """While this holds, the model ends at layer ℓ; the list receives the layer's output `[rows, width, hidden]`.

        The forward still enters through the wrapped model and returns as usual. Leaving it by an exception from a hook
        at layer ℓ would be shorter, but then DistributedDataParallel never prepares its reducer, and gradients are not
        averaged, and FSDP leaves its modules gathered. The stack is not cut from below too, since models look up masks by a
        layer's place in it.
        """
        owner, name = self._stack
        stack = getattr(owner, name)
        output: list[torch.Tensor] = []

        def cut(*_) -> None:
            # Within the forward of the module that owns the stack: FSDP looks for its modules when the root is first
            # entered, and must find all of them.
            setattr(owner, name, stack[: self.args.layer + 1])

        def start(_, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            # Gradient checkpointing makes the embeddings' output require a gradient. Nothing below the first trained
            # layer needs one; only the reentrant kind wants an input with a gradient to start from.
            wanted = torch.is_grad_enabled() and reentrant(self.args)
            return (args[0].detach().requires_grad_(wanted), *args[1:])

        def keep(_, args: Any, result: Any) -> None:
            output.append(result[0] if isinstance(result, tuple) else result)

        def mend(*_) -> None:
            # Before the wrapped model's own forward ends: DeepSpeed then looks through all modules that it prepared.
            setattr(owner, name, stack)

        with (
            owner.register_forward_pre_hook(cut),
            owner.register_forward_hook(mend, always_call=True),
            stack[self._first_layer].register_forward_pre_hook(start),
            stack[self.args.layer].register_forward_hook(keep),
        ):
            yield output

    @contextmanager
    def reference(self, model: nn.Module):
        """The frozen reference: the adapter disabled, or the former matrices put back in place of the trained ones."""
        if not self._kept:
            with super().reference(model):
                yield
            return
        with evaluating(self.accelerator.unwrap_model(model)), torch.no_grad(), ExitStack() as afterwards:
            self._exchange()
            afterwards.callback(self._exchange)
            yield

    def _exchange(self) -> None:
        # Pointers change places; no weight is copied. No graph is alive at that time: a step's backward has ended
        # before the next reference forward.
        for parameter, kept in self._kept:
            parameter.data, kept.data = kept.data.to(parameter.device), parameter.data

    def _write_model(self, folder):
        super()._write_model(folder)
        if self.args.should_save:
            save_file(self.control_vectors, folder / CONTROL_VECTORS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / CONTROL_VECTORS_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"`resume_from_checkpoint` is {str(resume_from_checkpoint)!r}, which lacks {CONTROL_VECTORS_FILE}: it is "
                "no checkpoint of RMU, and other vectors would make it another run."
            )
        vectors = load_file(path)
        if vectors.keys() != self.control_vectors.keys():
            raise ValueError(
                f"{path} has vectors for {sorted(vectors)}, but the datasets have the concepts "
                f"{sorted(self.control_vectors)}: resume with the same ones."
            )
        self._set_control_vectors(vectors)

    def _set_control_vectors(self, vectors: Mapping[str, torch.Tensor]) -> None:
        self.control_vectors = dict(sorted(vectors.items()))
        self._control = torch.stack(list(self.control_vectors.values())).to(self.args.device)  # [concepts, hidden]


def _with_concepts(
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]], concepts: list[str], examples: list[dict[str, Any]]
) -> dict[str, Any]:
    """A batch of a collator with what RMU needs to know of its tokens, computed on the CPU: their places in the flattened
    sub-batch, text after text, and the text of each; of forget text also the number of its concept. All `[tokens]`.
    """
    batches = collator(examples)
    for batch in (batches["forget"], batches["retain"]):
        batch["text"], columns = batch["attention_mask"].nonzero(as_tuple=True)
        batch["tokens"] = batch["text"] * batch["input_ids"].size(1) + columns
    numbers = torch.tensor([concepts.index(example["concept"]) for example in examples])
    batches["forget"]["concept"] = numbers[batches["forget"]["text"]]
    return batches
