"""Hidden states of every layer: how large they are, and the rank of their change and of an adapter's change of weights."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokens import text_ids, tokenize
from .pair import SIDES, ModelPair
from .statistics import Estimate, bootstrap_ratio


Positions: TypeAlias = Literal["last", "all"]


@dataclass(frozen=True)
class ActivationNorms:
    """Mean L2 norm per token of each layer's hidden states, the embeddings first, and erased over reference."""

    reference: list[Estimate]
    erased: list[Estimate]
    ratio: list[Estimate]


@dataclass(frozen=True)
class WeightEffect:
    """The change ΔW of one adapted weight: its layer (`None` outside them), its name there, singular values, the largest first."""

    layer: int | None
    module: str
    singular_values: list[float]
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True)
class HiddenEffect:
    """The change of hidden states, erased minus reference, per layer, the embeddings first.

    Attributes:
        effective_rank (`list[float]`): Of the centered changes; without an interval, as a resample holds texts twice
            and so has a lower rank than the sample.
        relative_size (`list[Estimate]`): Sum of the changes' L2 norms over that of the reference's states, with the
            interval over resampled texts. Where it is nearly zero, the rank is that of rounding errors.
        tokens (`int`): Tokens behind it; no rank can exceed their number minus one.
    """

    effective_rank: list[float]
    relative_size: list[Estimate]
    tokens: int


def hidden_states(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    positions: Positions = "last",
    max_length: int | None = None,
    batch_size: int = 16,
) -> list[torch.Tensor]:
    """Hidden states of every layer, without running the head, of a model that is in evaluation mode.

    Args:
        positions: `"last"` for the last token of each text, `"all"` for all of its tokens.
        max_length: Tokens of a text that are read; all of them by default.

    Returns:
        `list[torch.Tensor]`: for each text `[layers + 1, tokens, hidden]`, in float32 on the CPU. The first entry is
        the embeddings' output, entry `i` that of layer `i`. Unlike in transformers' `hidden_states` the last entry
        too stands *before* the model's final norm, so that it can be set beside the others.

    Raises:
        ValueError: if there are no texts, one holds no token, or the model's decoder or final norm cannot be found.
    """
    found = dict(_states_by_text(model, processing_class, texts, positions, max_length, batch_size))
    return [found[index] for index in range(len(texts))]


def activation_norms(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    batch_size: int = 16,
    seed: int = 0,
) -> ActivationNorms:
    """How large the hidden states of both models are on the same texts, layer by layer.

    A text's first token is left out: models park attention on it and give it a norm that can be a hundred times that
    of the others, so that it alone would make the mean. Intervals are over resampled texts, the same ones on both sides.
    """
    tokens = [0] * len(texts)
    sums: dict[str, list[list[float]]] = {}
    for side in SIDES:
        sums[side] = [[] for _ in texts]
        with pair.use(side) as model:
            for index, states in _states_by_text(model, processing_class, texts, "all", max_length, batch_size):
                norms = states[:, 1:].norm(dim=-1)  # [layers + 1, tokens - 1]
                sums[side][index] = norms.sum(-1).tolist()
                tokens[index] = norms.size(1)
    reference, erased = (list(zip(*sums[side], strict=True)) for side in SIDES)
    return ActivationNorms(
        [bootstrap_ratio(layer, tokens, seed=seed) for layer in reference],
        [bootstrap_ratio(layer, tokens, seed=seed) for layer in erased],
        [bootstrap_ratio(*layers, seed=seed) for layers in zip(erased, reference, strict=True)],
    )


def hidden_effect(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    max_tokens: int = 1024,
    batch_size: int = 16,
    seed: int = 0,
) -> HiddenEffect:
    """Rank of the change of the hidden states on the same tokens, layer by layer, for any pair of models.

    The first token of a text is left out, as in [`activation_norms`]. After `max_tokens` no further text is read: all layers of
    all these tokens are held at once.
    """
    read: list[str] = []
    tokens = 0
    for text in texts:
        if tokens < max_tokens:
            read.append(text)
            tokens += len(text_ids(processing_class, text)[:max_length]) - 1
    states = {}
    for side in SIDES:
        with pair.use(side) as model:
            found = hidden_states(
                model, processing_class, read, positions="all", max_length=max_length, batch_size=batch_size
            )
        states[side] = [text[:, 1:] for text in found]
    reference, erased = (torch.cat(states[side], dim=1) for side in SIDES)  # [layers + 1, tokens, hidden]
    if reference.shape != erased.shape:
        shapes = [f"{tensor.size(0) - 1} layers of width {tensor.size(2)}" for tensor in (reference, erased)]
        raise ValueError(f"The reference has {shapes[0]} and the erased model {shapes[1]}: pass models of one shape.")
    if reference.size(1) < 2:
        raise ValueError(f"`texts` has {reference.size(1)} tokens beside first ones: pass longer texts, or more.")
    change = erased - reference
    ranks = [effective_rank(torch.linalg.svdvals(layer - layer.mean(0))) for layer in change]
    lengths = [text.size(1) for text in states["reference"]]
    # Sum of the L2 norms of each text's states, `[layers + 1][texts]`.
    sums = [
        [[float(norms.sum()) for norms in layer.split(lengths)] for layer in tensor.norm(dim=-1)]
        for tensor in (change, reference)
    ]
    sizes = [bootstrap_ratio(*layers, seed=seed) for layers in zip(*sums, strict=True)]
    return HiddenEffect(ranks, sizes, change.size(1))


def weight_effects(model: PeftModel) -> list[WeightEffect]:
    """Rank of the change that the active LoRA adapters make to each weight, `ΔW = Σ scaling·B·A`; empty for other adapters.

    Only low-rank changes are counted: biases, and modules that an adapter saves whole, are not. Where a change is not
    `scaling·B·A`, as with DoRA or LoRA on the experts' stacked weights, that is a `ValueError`.
    """
    effects = []
    for name, module in model.named_modules():
        values = _singular_values(name, module) if isinstance(module, LoraLayer) else None
        if values is not None:
            # Of `…layers.6.mlp.up_proj`, 6 and `mlp.up_proj`.
            found = re.search(r"(?:^|\.)(\d+)(?:\.|$)(.*)", name)
            layer, inner = (int(found[1]), found[2]) if found else (None, name.rpartition(".")[2])
            effects.append(WeightEffect(layer, inner, values.tolist(), effective_rank(values), stable_rank(values)))
    return effects


def effective_rank(singular_values: torch.Tensor) -> float:
    """Exponential of the entropy of the normalized squared singular values; 0 for a matrix of zeros.

    After Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, eq. 2-4. They
    normalize the singular values themselves; of their squares, this is their effective rank of `MᵀM`, and says over how
    many directions the squared Frobenius norm of `M` is spread.
    """
    energy = singular_values.double().square()
    return float(torch.special.entr(energy / energy.sum()).sum().exp()) if energy.sum() else 0.0


def stable_rank(singular_values: torch.Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm; 0 for a matrix of zeros."""
    energy = singular_values.double().square()
    return float(energy.sum() / energy.max()) if energy.sum() else 0.0


def _singular_values(name: str, layer: LoraLayer) -> torch.Tensor | None:
    """Singular values of `Σ scaling·B·A` over the active adapters, without making the full matrix."""
    ups, downs = [], []
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        elif adapter in layer.lora_embedding_A:
            down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            continue
        if adapter in layer.lora_variant or down.dim() != 2 or down.size(0) != layer.r[adapter]:
            raise ValueError(
                f"The adapter {adapter!r} is no plain LoRA on a matrix at {name}, so its change of the weight is not "
                "scaling·B·A: merge it, and compare the hidden states of the merged model and the reference alone."
            )
        downs.append(down.detach().float())  # [rank, in]
        ups.append(layer.scaling[adapter] * up.detach().float())  # [out, rank]
    if not ups:
        return None
    # The orthogonal factors of QR change no singular value of the product.
    up_factor, down_factor = (torch.linalg.qr(m, mode="r").R for m in (torch.cat(ups, dim=1), torch.cat(downs).T))
    return torch.linalg.svdvals(up_factor @ down_factor.T).cpu()


def decoder_of(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The model without its head, its adapter in place; a learned prompt, which stands outside the decoder, is refused."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"The adapter {model.active_adapter!r} is a {model.active_peft_config.peft_type.value}, a learned prompt "
            "without weights in the layers: look inside an adapter that changes the layers, such as LoRA."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = base.get_decoder()
    if decoder is base:
        raise ValueError(
            f"{type(base).__name__} has no decoder apart from its head: pass a causal language model that transformers "
            "has a class for."
        )
    return decoder


@torch.inference_mode()
def final_norm(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The norm between the last layer and the head: the child of the decoder whose output is the decoder's own.

    Its name and place differ between model classes, so it is found by running a few tokens.
    """
    decoder = decoder_of(model)
    outputs: list[tuple[nn.Module, object]] = []
    handles = [
        child.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
        for child in decoder.children()
    ]
    # Several tokens: the embedding of one of them may be all zeros, and then every output is.
    input_ids = torch.arange(min(8, model.config.get_text_config().vocab_size), device=model.device)[None]
    try:
        last = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    for module, output in outputs:
        # `equal` is false for other shapes.
        if isinstance(output, torch.Tensor) and torch.equal(output.to(last.device), last):
            return module
    raise ValueError(
        f"The final norm of {type(decoder).__name__} cannot be found: none of its parts "
        f"{[name for name, _ in decoder.named_children()]} gives the output of the whole. Use a model with a norm "
        "between its last layer and its head."
    )


@torch.inference_mode()
def _states_by_text(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    positions: Positions,
    max_length: int | None,
    batch_size: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Index and hidden states of one text after the other, so that those of all texts need not be held at once."""
    if not texts:
        raise ValueError("`texts` is empty, so there is nothing to read: pass at least one text.")
    ids = [text.ids[:max_length] for text in tokenize(processing_class, texts)]
    if empty := [text for text, tokens in zip(texts, ids, strict=True) if not tokens]:
        raise ValueError(f"`texts` holds {empty[0]!r}, which has no token: leave it out.")
    # Texts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda index: len(ids[index]))
    decoder, norm = decoder_of(model), final_norm(model)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        # Padding on the right needs no positions, which some decoders do not take, and no pad token: it is masked.
        input_ids = pad_sequence([torch.tensor(ids[index]) for index in batch], batch_first=True)  # [batch, seq]
        mask = pad_sequence([torch.ones(len(ids[index]), dtype=torch.long) for index in batch], batch_first=True)
        received: list[torch.Tensor] = []
        handle = norm.register_forward_pre_hook(lambda _, args, received=received: received.append(args[0]))
        try:
            outputs = decoder(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                output_hidden_states=True,
                use_cache=False,
            )
        finally:
            handle.remove()
        lengths = mask.sum(-1)
        places = mask.flatten().nonzero()[:, 0]  # [tokens]
        if positions == "last":
            places, lengths = places[lengths.cumsum(0) - 1], torch.ones_like(lengths)
        # The last layer's states are taken as the final norm receives them. Chosen positions are gathered before
        # anything is copied, in the model's own precision.
        layers = [*outputs.hidden_states[:-1], *received]
        chosen = [layer.flatten(0, 1)[places.to(layer.device)].to(model.device) for layer in layers]
        states = torch.stack(chosen).cpu().float()  # [layers + 1, tokens, hidden]
        yield from zip(batch, states.split(lengths.tolist(), dim=1), strict=True)
