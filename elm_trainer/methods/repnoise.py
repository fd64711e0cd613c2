"""Representation Noising (RepNoise, arXiv 2405.14577): config, loss and trainer."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn

from ..distributed import gathered
from ..head import FinalLogits, read_positions
from ..modeling import decoder_layers, reentrant
from ..objectives import text_sums
from .base import ErasureTrainer
from .config import ErasureConfig
from .forward import nll_reading, upcast


BANDWIDTHS = 5


@dataclass
class RepNoiseConfig(ErasureConfig):
    r"""
    Configuration class for the [`RepNoiseTrainer`]: its parameters beside those of [`~trl.SFTConfig`].

    Parameters:
        alpha (`float`, *optional*, defaults to `1.0`): Weight α of the ascent term. `0` skips it: no layer is read
            out.
        beta (`float`, *optional*, defaults to `1e-3`): Weight β of the noise term. `0` skips it: no MLP is watched.
        faithful (`bool`, *optional*, defaults to `False`): Repeat what the official code does beside the formula: the
            last layer is read out through the final norm twice; tokens that stand at the same place of the paired
            forget and retain text are masked, and where such a token is to predict one that is not, its logits are
            zeros and cost `log(vocabulary)`; the token with id 0 is no label; means are over tokens instead of over
            texts.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `1e-4`, as in the official demonstration, instead of `2e-5`.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})

    alpha: float = field(default=1.0, metadata={"help": "Weight of the ascent term."})
    beta: float = field(default=1e-3, metadata={"help": "Weight of the noise term."})
    faithful: bool = field(default=False, metadata={"help": "Repeat the quirks of the official code."})

    _rules = {"at least 0": ("alpha", "beta")}


def gaussian_mmd(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""Squared maximum mean discrepancy of two samples of equal size (arXiv 2405.14577, the noise loss).

    `mean(K_ss + K_tt − K_st − K_ts)` with the kernel `K(a, b) = Σ_{i=0..4} exp(−‖a − b‖² / (2^i·σ))`, where σ is a
    quarter of the mean squared distance between two different points of both samples, held constant in the gradient.
    This is the biased estimate: never below 0, and 0 for equal samples. Two samples of one point each always give
    `2·(5 − e^−4 − e^−2 − e^−1 − e^−½ − e^−¼) = 6.18628`, since their distance is the mean distance; the gradient still
    draws them together.

    Args:
        source, target: `[samples, features]`.

    Returns:
        `torch.Tensor`: a scalar, in float32 or, for such samples, float64.
    """
    samples = len(source)
    with torch.autocast(source.device.type, enabled=False):
        points = upcast(torch.cat([source, target]))
        # One matrix product, as differences would be `[2·samples, 2·samples, features]`; centered, for less cancellation.
        points = points - points.mean(0).detach()
        products = points @ points.T
        norms = products.diagonal()
        distances = (norms[:, None] + norms - 2 * products).clamp(min=0)  # [2·samples, 2·samples], squared
        sigma = distances.detach().sum() / (2 * samples * (2 * samples - 1)) / 4
        # Points that are all the same have no distance to divide by; the kernel of 0 is 1 at any width.
        sigma = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
        kernel = torch.stack([(-distances / (sigma * 2**index)).exp() for index in range(BANDWIDTHS)]).sum(0)
        signs = torch.ones_like(norms)
        signs[samples:] = -1
        return signs @ kernel @ signs / samples**2


def ascent_term(total: torch.Tensor, layers: int) -> torch.Tensor:
    """`log(1 + S/(L + 1))` (arXiv 2405.14577, layer-wise ascent), for the sum `S` of L + 2 cross-entropies."""
    return torch.log1p(total / (layers + 1))


class PositionWeights(NamedTuple):
    """How the cross-entropies of a sub-batch's positions make one: weights `[positions]`, and what is added to their sum."""

    values: torch.Tensor
    constant: torch.Tensor | float = 0.0

    def sum(self, losses: torch.Tensor) -> torch.Tensor:
        """`Σ_i w_i·loss_i + constant`, a scalar, for losses `[positions]`."""
        return (losses * self.values).sum() + self.constant


def text_weights(batch: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> PositionWeights:
    """The mean over texts of the mean over each text's positions."""
    texts, rows = batch["input_ids"].size(0), batch["rows"]
    counts = text_sums(torch.ones(len(rows), dtype=dtype, device=rows.device), rows, texts)
    return PositionWeights(1 / (texts * counts[rows]))


def differing_tokens(batch: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mask `[batch, seq]` of tokens that are not those at the same place of the paired text (the official code's mask).

    Padding is never in it. In the official code it is where the other text continues.
    """
    mask, ids, paired = batch["attention_mask"].bool(), batch["input_ids"], other["input_ids"]
    # Places are counted from the first token, wherever the padding is.
    place = mask.cumsum(-1) - 1
    column = place + other["attention_mask"].argmax(-1, keepdim=True)
    within = place < other["attention_mask"].sum(-1, keepdim=True)
    return mask & ~(within & (paired.gather(1, column.clamp(0, paired.size(1) - 1)) == ids))


def official_weights(
    batch: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
) -> PositionWeights:
    """The official code's mean over tokens: of those that differ from the paired text's, and whose id is not 0.

    Where the token before is the paired text's, the official code multiplies the logits by 0 and keeps the label. Such a
    position costs `log(vocabulary)`, whatever the model says.
    """
    mask, rows, columns = differing_tokens(batch, other), batch["rows"], batch["columns"]
    counted = mask[rows, columns + 1] & (batch["labels"][rows, columns + 1] != 0)
    weights = counted.to(dtype) / counted.sum().clamp(min=1)
    visible = mask[rows, columns]
    return PositionWeights(weights * visible, (weights * ~visible).sum() * math.log(vocabulary))


class SumOverPieces(torch.autograd.Function):
    """`Σ function(piece)` over tensors, differentiated in the forward, so that what the function makes is freed piece by piece."""

    @staticmethod
    def forward(ctx, function, *pieces):
        values, gradients = [], []
        for piece, needed in zip(pieces, ctx.needs_input_grad[1:], strict=True):
            with torch.set_grad_enabled(needed):
                leaf = piece.detach().requires_grad_(needed)
                value = function(leaf)
            gradients.append(torch.autograd.grad(value, leaf)[0] if needed else None)
            values.append(value.detach())
        ctx.save_for_backward(*gradients)
        return torch.stack(values).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        return (None, *(None if saved is None else saved * grad_output for saved in ctx.saved_tensors))


class RepNoiseTrainer(ErasureTrainer):
    r"""Trainer for Representation Noising (RepNoise, arXiv 2405.14577).

    `Loss = CE(retain) + β·N − α·log(1 + S/(L + 1))`, where L is the number of layers.

    `S` sums L + 2 cross-entropies on forget text: that of the head, and those of the head (behind the final norm)
    applied to the embeddings and to every layer. Read through one norm, the last layer gives the head's own
    logits, so that their cross-entropy counts twice and is computed once. `N` is the mean over layers of
    [`gaussian_mmd`] between the MLP's outputs on the forget texts and draws from N(0, I): a sample is a text, all its
    positions side by side, with zeros for padding in both. Its width is the only stop-gradient.

    Nothing in the loss holds logits of two layers at once, nor noise of two layers. A step costs L readings of the head on
    the forget text beside the forward (more than the layers themselves where the vocabulary is large), and for the
    MMD `(2·texts)²·tokens·hidden` multiplications per layer, which is little.

    Both terms are those of a batch: MMD and logarithm are not means over texts, so a batch of four is not four batches of
    one. With a single text, `N` has a constant value (see [`gaussian_mmd`]).

    The noise depends on `seed`, step, place in the accumulation and process alone, so that a resumed run draws what an
    uninterrupted one draws; evaluations all draw the same.

    Takes the arguments of [`~trl.SFTTrainer`] and raises what [`ErasureTrainer`] raises.

    Raises:
        ValueError: if the model's layers have no `mlp`, its final norm cannot be found, or gradient checkpointing is
            of the kind (`use_reentrant`) that hides what happens inside a layer.
    """

    _name = "RepNoise"
    _config_class = RepNoiseConfig
    args: RepNoiseConfig

    def set_up(self):
        if reentrant(self.args):
            raise ValueError(
                "`gradient_checkpointing_kwargs` has `use_reentrant=True` (DeepSpeed ZeRO-3 forces it), through which no "
                "gradient reaches the MLPs' outputs: set it to False, or `gradient_checkpointing=False`."
            )
        unwrapped = self.accelerator.unwrap_model(self.model)
        decoder = (unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped).get_decoder()
        self._layers = decoder_layers(decoder)
        self._norm, self._head = final_norm(decoder, self._layers), unwrapped.get_output_embeddings()
        self._vocabulary = unwrapped.config.get_text_config().vocab_size
        self._mlps = layer_mlps(self._layers) if self.args.beta else []
        self._drawn = (-1, 0)

    def packed_together(self):
        return [("retain", "forget") if self.args.alpha or self.args.beta else ("retain",)]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        alpha, beta = self.args.alpha, self.args.beta
        batches = {name: inputs[name] for name in self.packed_together()[0]}
        # Both are measured by forwards of their own, which must not be watched.
        final, _ = self.packed.final_logits(model), self.packed.texts_interact(model)
        with self._watch() as (states, outputs):
            losses = self.position_losses(model, batches)
        terms = {"retain": self._weights(inputs, "retain", losses["retain"].dtype).sum(losses["retain"])}
        if alpha or beta:
            # Where the forget text's tokens lie in the rows that `position_losses` packed, retain text first.
            packing, forget = self.packed.pack(model, list(batches.values())), inputs["forget"]["input_ids"]
            slots = packing.slots[-forget.numel() :].view_as(forget)  # [batch, seq]
        if alpha:
            total = self._layerwise_nll(losses["forget"], states, final, slots, inputs)
            terms["ascent"] = ascent_term(total, len(self._layers))
        if beta:
            terms["noise"] = self._distance_to_noise(outputs, slots, inputs)
        loss = self.weigh(terms, {"retain": 1.0, "noise": beta, "ascent": -alpha})
        return (loss, None) if return_outputs else loss

    def _layerwise_nll(
        self,
        losses: torch.Tensor,
        states: Sequence[torch.Tensor],
        final: FinalLogits,
        slots: torch.Tensor,
        inputs: Mapping[str, Any],
    ) -> torch.Tensor:
        """`S`, of L + 2 terms."""
        forget, weights = inputs["forget"], self._weights(inputs, "forget", losses.dtype)
        # Through one norm, the last layer is read as the head reads it.
        total = (1 if self.args.faithful else 2) * weights.sum(losses)
        places, nll = slots[forget["rows"], forget["columns"]], nll_reading(forget)
        # The model's forward alone runs in mixed precision; the readings are to run as it does.
        with self.accelerator.autocast(), gathered(self._head):
            for state in states:
                supervised = self._norm(state.flatten(0, 1).index_select(0, places))
                values = read_positions(self._head, final, nll, supervised, vocabulary=self._vocabulary)
                total = total + weights.sum(values)
        return total

    def _distance_to_noise(
        self, outputs: Sequence[torch.Tensor], slots: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """`N`, the mean over layers."""
        forget = inputs["forget"]
        real, lengths = forget["attention_mask"], forget["lengths"]
        mask = differing_tokens(forget, inputs["retain"]) if self.args.faithful else real.bool()
        # From every text's first token on, so that what is drawn for a token does not depend on padding.
        places = real.argmax(-1, keepdim=True) + torch.arange(max(lengths), device=real.device)  # [batch, longest]
        places = places.clamp(max=real.size(1) - 1)
        within = torch.arange(max(lengths), device=real.device) < real.sum(-1, keepdim=True)
        mask = (mask.gather(1, places) & within).flatten()[:, None]  # [batch·longest, 1]
        slots = slots.gather(1, places).flatten()
        generator = self._generator(slots.device)

        def distance(activations: torch.Tensor) -> torch.Tensor:  # [batch·longest, hidden]
            source = upcast(activations)
            noise = torch.randn(source.shape, generator=generator, device=source.device, dtype=source.dtype)
            return gaussian_mmd(*((part * mask).view(len(lengths), -1) for part in (source, noise)))

        activations = [output.flatten(0, 1).index_select(0, slots) for output in outputs]
        return SumOverPieces.apply(distance, *activations) / len(activations)

    def _weights(self, inputs: Mapping[str, Any], name: str, dtype: torch.dtype) -> PositionWeights:
        if not self.args.faithful:
            return text_weights(inputs[name], dtype)
        other = inputs["retain" if name == "forget" else "forget"]
        return official_weights(inputs[name], other, self._vocabulary, dtype)

    @contextmanager
    def _watch(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Record what enters every layer (and, if `faithful`, leaves the final norm), and what leaves every MLP.

        All `[rows, width, hidden]`. The hooks are gone when gradient checkpointing runs a layer again.
        """
        states: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []

        def entered(_, args, kwargs):
            states.append(args[0] if args else kwargs["hidden_states"])

        def left(_, args, output):
            # Some experts' MLPs also return their router's logits.
            outputs.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as hooks:
            for layer in self._layers if self.args.alpha else ():
                hooks.enter_context(layer.register_forward_pre_hook(entered, with_kwargs=True))
            if self.args.alpha and self.args.faithful:
                hooks.enter_context(self._norm.register_forward_hook(lambda _, args, output: states.append(output)))
            for mlp in self._mlps:
                hooks.enter_context(mlp.register_forward_hook(left))
            yield states, outputs

    def _generator(self, device: torch.device) -> torch.Generator:
        """The random state of a step's noise, apart from the global one."""
        source = f"{self.args.seed}-{self.accelerator.process_index}"
        if self.model.training:
            step, place = self._drawn
            self._drawn = (self.state.global_step, place + 1 if step == self.state.global_step else 0)
            source += f"-{self._drawn[0]}-{self._drawn[1]}"
        return torch.Generator(device).manual_seed(random.Random(source).getrandbits(63))


def layer_mlps(layers: nn.ModuleList) -> list[nn.Module]:
    """Each layer's MLP; raises `ValueError` if a layer has none of that name."""
    for layer in layers:
        children = dict(layer.named_children())
        if "mlp" not in children:
            raise ValueError(
                f"`beta` needs the outputs of every layer's `mlp`, but {type(layer).__name__} has only {sorted(children)}: "
                "set `beta=0`, or use another model."
            )
    return [layer.get_submodule("mlp") for layer in layers]


def final_norm(decoder: nn.Module, layers: nn.ModuleList) -> nn.Module:
    """The norm before the head: the decoder's last part beside its layers that is a norm; raises `ValueError` if none is."""
    # Parts of a part, since a norm that is trained is wrapped.
    norms = [
        child
        for child in decoder.children()
        if child is not layers and any("norm" in type(part).__name__.lower() for part in child.modules())
    ]
    if not norms:
        raise ValueError(
            f"The final norm of {type(decoder).__name__} cannot be found: none of its parts "
            f"{[name for name, _ in decoder.named_children()]} is a norm. Use a model that has one before its head."
        )
    return norms[-1]
