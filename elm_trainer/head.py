"""The LM head on chosen positions only, a chunk at a time, inside the model's own forward.

Logits are by far the largest tensor of a step: `[positions, vocab]`, in float32 and with their gradient. What the methods
need of them is a number per position, which depends on that position's hidden state alone. So logits are made, read,
differentiated and dropped chunk by chunk, and memory does not grow with positions × vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from .modeling import evaluating


# `reading(logits, where, *further)`: of logits `[chunk, vocab]` of the positions `where`, and of the logits of further
# states at the same positions. Gives one number per position, `[chunk]`; without gradients also a tuple of tensors
# `[chunk, ...]`.
Reading: TypeAlias = Callable[..., Any]
# Logits that are made at a time: 2²³ in float32 are 32 MB. On a CPU fewer make thin matrix products, and more leave the
# cache.
CHUNK = 2**23
# On an accelerator, 256 MB, but at most this share of its memory. For each chunk the head's matrix is read again, and with
# 523 positions at a vocabulary of 128k that takes less time than the products (from some 300 on, on an H100 in bfloat16).
ACCELERATOR_CHUNK = 2**26
MEMORY_SHARE = 1 / 64


def chunk_of(device: torch.device) -> int:
    """Logits that are made at a time: `CHUNK` on a CPU and wherever the memory is not known; on a GPU of NVIDIA, AMD or Intel
    `ACCELERATOR_CHUNK`, or `MEMORY_SHARE` of its memory where that is less, but never below `CHUNK`.
    """
    if device.type not in ("cuda", "xpu"):
        return CHUNK
    memory = torch.get_device_module(device).get_device_properties(device).total_memory
    return max(CHUNK, min(ACCELERATOR_CHUNK, int(MEMORY_SHARE * memory) // 4))


@contextmanager
def without_gradients() -> Iterator[None]:
    """`torch.no_grad()`, of which autocast keeps no casts of weights: torch 2.6 takes them in the forward that is to be
    differentiated too, where the weights then get no gradient.
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def STATES(logits: torch.Tensor, where: slice) -> torch.Tensor:
    """The reading that asks for what enters the head, `[positions, hidden]`, without gradient; the head is not run."""
    raise TypeError("`STATES` is not to be called: pass it as a reading.")


@contextmanager
def standing_in(instead: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While this holds, modules run what stands in for their `forward`."""
    own = {module: vars(module).get("forward") for module in instead}
    try:
        for module, forward in instead.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward  # type: ignore[method-assign]


@contextmanager
def cast_once(head: nn.Module) -> Iterator[None]:
    """While this holds, a frozen head casts its weights once where autocast wants them in 16 bits, and for no position not at all.

    Autocast keeps casts of trained weights alone, so that a frozen head is cast again for every chunk of positions, and also by a
    model whose logits nobody asks for: 262,144 tokens of 640 numbers (Gemma 3 270M) take as long as several layers. The logits
    are the same to the last bit. Other heads than plain `nn.Linear` stay as they are.
    """
    if type(head) is not nn.Linear or "forward" in vars(head):
        yield
        return
    casts: list[torch.Tensor | None] = []

    def forward(states: torch.Tensor) -> torch.Tensor:
        kind, weight = states.device.type, head.weight
        if weight.requires_grad or weight.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
            return F.linear(states, weight, head.bias)
        if not states.numel():
            return states[..., :1].expand(*states.shape[:-1], head.out_features)
        if not casts:
            dtype = torch.get_autocast_dtype(kind)
            casts.extend(None if part is None else part.detach().to(dtype) for part in (weight, head.bias))
        return F.linear(states, *casts)

    with standing_in({head: forward}):
        yield


@dataclass(frozen=True)
class FinalLogits:
    """What a model does to its head's output: `cap·tanh(scale·x/cap)`, or `scale·x` without a cap."""

    scale: float = 1.0  # as of Cohere and Granite
    cap: float | None = None  # as of Gemma 2

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def final_logits(model: nn.Module, head: nn.Module, vocabulary: int) -> FinalLogits:
    """Measure what a model does to its head's output, by giving `vocabulary` numbers in the head's place, for one token.

    Configs name it in many ways, and one that is overlooked would make every loss wrong.

    Raises:
        NotImplementedError: if it is neither a scale nor a soft cap.
    """
    device = next(model.parameters()).device
    given = torch.linspace(-90, 90, vocabulary, device=device)[None, None]
    given[..., :3] = torch.tensor([1.0, 1e-2, 1e30], device=device)
    with head.register_forward_hook(lambda *_: given.clone()), evaluating(model), without_gradients():
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        found = model(input_ids=token, use_cache=False).logits.float()
    one, small, huge = found[0, 0, :3].tolist()
    # A cap shows where the numbers are huge, a scale where they are small.
    cap = huge if huge < 1e6 else None
    scale = one if cap is None else small / 1e-2
    result = FinalLogits(1.0 if abs(scale - 1) < 1e-5 else scale, cap)
    if not torch.allclose(found, result(given), rtol=1e-4, atol=1e-4):
        raise NotImplementedError(
            f"{type(model).__name__} changes its head's output by more than a scale and a soft cap, so that its logits "
            "cannot be read a chunk at a time: use a model that does not."
        )
    return result


def read_positions(
    head: nn.Module,
    final: FinalLogits,
    reading: Reading,
    states: torch.Tensor,
    further: Sequence[torch.Tensor] = (),
    *,
    vocabulary: int,
) -> Any:
    """Apply a reading to the logits of positions, a chunk at a time.

    Where gradients are wanted, those of a chunk are made at once and its logits dropped: `∂value/∂state` of each position
    is kept, `[positions, hidden]`, which is exact since a value depends on no other position. Where the head itself is
    trained, chunks are computed again in the backward instead.

    Args:
        head: Output embeddings of the model.
        final: What the model does to their output.
        states: What enters the head, `[positions, hidden]`.
        further: Further states of the same shape, which get no gradient.
        vocabulary: Size of the head's output, by which and by the device ([`chunk_of`]) the size of a chunk goes.

    Returns:
        What the reading gives, for all positions: `[positions]`, or without gradients a tuple of `[positions, ...]`.
    """

    def read(piece: torch.Tensor, where: slice) -> Any:
        with without_gradients():
            others = [final(head.forward(state[where].to(piece.dtype))) for state in further]
        # `forward` past the hooks: this is within the head's own call.
        return reading(final(head.forward(piece)), where, *others)

    chunk = max(chunk_of(states.device) // vocabulary, 1)
    parts = [slice(start, start + chunk) for start in range(0, max(len(states), 1), chunk)]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters()):
        return torch.cat([checkpoint(read, states[where], where, use_reentrant=False) for where in parts])
    if torch.is_grad_enabled() and states.requires_grad:
        return _DifferentiateNow.apply(states, read, parts)
    values = [read(states[where], where) for where in parts]
    if isinstance(values[0], tuple):
        return tuple(torch.cat(column) for column in zip(*values, strict=True))
    return torch.cat(values)


class _DifferentiateNow(torch.autograd.Function):
    """Values of positions with their gradients by their own states, made chunk by chunk in the forward."""

    @staticmethod
    def forward(ctx, states, read, parts):
        gradients, values = torch.empty_like(states), []
        for where in parts:
            with torch.enable_grad():
                piece = states[where].detach().requires_grad_()
                value = read(piece, where)
            (gradients[where],) = torch.autograd.grad(value, piece, torch.ones_like(value))
            values.append(value.detach())
        ctx.save_for_backward(gradients)
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (gradients,) = ctx.saved_tensors
        return (gradients * grad_output[:, None]).to(gradients.dtype), None, None


@dataclass
class Plan:
    """What is wanted of positions.

    Args:
        reading (`Reading`, *optional*): Gives what is wanted of their logits, which are whole without one: more than a step can
            afford for large vocabularies.
        further (`Sequence[torch.Tensor]`, *optional*): States of other forwards at the same positions, `[positions, hidden]`
            each, whose logits the reading takes after `where`.
        beside (`Sequence[torch.Tensor]`, *optional*): Other positions of the same forward, `[positions]` each, whose logits the
            reading takes after those: indices into the flattened tokens of all sub-batches, one after the other.
        states (`int`, *optional*): Which states, `[positions, hidden]`, are wanted after the tuple that the reading gives, which is
            without gradients then: 0 for what enters the head at the positions themselves, 1 for the first of `further` and `beside`.
    """

    reading: Reading | None = None
    further: Sequence[torch.Tensor] = ()
    beside: Sequence[torch.Tensor] = ()
    states: int | None = None


@dataclass
class ReadHead:
    """Read the LM head on chosen positions while the model runs.

    The readings happen within the head's own call, where FSDP and DeepSpeed have gathered its weights.
    """

    head: nn.Module
    final: FinalLogits
    positions: torch.Tensor  # flat indices `row * seq + column`, `[positions]`, plan after plan
    counts: list[int]  # how many of them are a plan's
    plans: Sequence[Plan]  # with such indices in `beside`
    vocabulary: int
    compiled: bool = False  # whether `torch.compile` has the head, which then casts as it will
    _read: list[Any] = field(default_factory=list, init=False)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While this holds, the model's logits are those of the plans without a reading, `[1, positions, vocab]`."""
        casting = nullcontext() if self.compiled else cast_once(self.head)
        with self.head.register_forward_pre_hook(self._enter), casting:
            yield

    def results(self, logits: torch.Tensor) -> list[Any]:
        """What was wanted, plan by plan, given the model's logits `[1, positions, vocab]`."""
        if logits.requires_grad and not logits.size(1):
            # FSDP gathers what lies outside the layers again when the backward passes the model's own output.
            self._read = [part + 0 * logits.sum() if part.requires_grad else part for part in self._read]
        counts = [count for count, plan in zip(self.counts, self.plans, strict=True) if plan.reading is None]
        whole = iter(logits[0].split(counts))
        read = iter(self._read)
        return [next(whole if plan.reading is None else read) for plan in self.plans]

    def _enter(self, _, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        everything = args[0].flatten(0, 1)
        states = everything.index_select(0, self.positions)
        whole = [states[:0]]
        for plan, own in zip(self.plans, states.split(self.counts), strict=True):
            if plan.reading is None:
                whole.append(own)
            elif plan.reading is STATES:
                self._read.append(own.detach())
            else:
                further = [*plan.further, *(everything.index_select(0, place).detach() for place in plan.beside)]
                found = read_positions(self.head, self.final, plan.reading, own, further, vocabulary=self.vocabulary)
                self._read.append(found if plan.states is None else (*found, [own.detach(), *further][plan.states]))
        return (torch.cat(whole).unsqueeze(0), *args[1:])


def keep_positions(head: nn.Module, positions: torch.Tensor) -> RemovableHandle:
    """Run the LM head on chosen positions only, inside the model's own forward, while `with` holds what this gives.

    The head's input `[batch, seq, hidden]` is reduced to `[1, kept, hidden]`, those at the flat indices `positions`, `row * seq +
    column`: the model still scales or soft-caps its logits, and no `[batch, seq, vocab]` tensor is made.
    """

    def reduce(_, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].flatten(0, 1).index_select(0, positions).unsqueeze(0), *args[1:])

    return head.register_forward_pre_hook(reduce)
