"""The arithmetic of the released ELM code, written anew as the baseline: what it computes, in the order it computes it.

Three reference forwards, three forwards with gradient, three backwards, each of one text; targets in float64 over
`[seq, vocab]`; no schedule, no clipping. Its known faults (a consistency token that is never supervised, the last partial
accumulation dropped) are left out: they would make the baseline no slower.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from elm_trainer import Concept
from elm_trainer.data.tokens import tokenize_pair


@dataclass(frozen=True)
class ReleasedSample:
    """Tokens of one sample.

    Args:
        forget, expert, novice (`list[int]`): The forget text, and the contexts that stand before it.
        retain (`list[int]`): The retain text.
        synthetic (`list[int]`), completion_start (`int`): A synthetic pair, and where its completion begins.
    """

    forget: list[int]
    expert: list[int]
    novice: list[int]
    retain: list[int]
    synthetic: list[int]
    completion_start: int


def tokenize_samples(
    rows: Sequence[dict[str, str]], concept: Concept, processing_class: PreTrainedTokenizerBase, seed: int = 0,
    max_length: int | None = None,
) -> list[ReleasedSample]:  # fmt: skip
    """Tokenise rows of an erasure dataset, each with an expert and a novice context drawn at random."""
    rng = random.Random(seed)
    samples = []
    for row in rows:
        pair, start = tokenize_pair(processing_class, row["prompt"], row["completion"])
        expert, novice = (
            processing_class(context + "\n")["input_ids"]
            for context in rng.choice(list(zip(concept.expert_contexts, concept.novice_contexts, strict=True)))
        )
        forget, retain = (processing_class(row[name])["input_ids"][:max_length] for name in ("forget", "retain"))
        samples.append(ReleasedSample(forget, expert, novice, retain, pair[:max_length], start))
    return samples


def released_target(
    base: torch.Tensor,
    expert: torch.Tensor,
    novice: torch.Tensor,
    *,
    eta: float,
    eta_end: float,
    tau: float,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Erase target of one text: `b − η·(e − n)` in float64, η growing along the text, then its `top_k` largest.

    Args:
        base, expert, novice (`torch.Tensor`): Logits of the predictions of one text's tokens after the first,
            `[seq - 1, vocab]`.
        eta, eta_end (`float`): η behind the text's first and last token.
        tau (`float`): Temperature.
        top_k (`int`): Tokens kept.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: token ids and probabilities, `[seq - 1, top_k]`.
    """
    b, e, n = (F.log_softmax(logits.double() / tau, dim=-1) for logits in (base, expert, novice))
    ramp = torch.linspace(eta, eta_end, base.size(0) + 1, dtype=torch.float64, device=base.device)[:-1, None]
    values, indices = (b - ramp * (e - n)).topk(top_k, dim=-1)
    return indices, values.softmax(dim=-1)


def released_updates(
    model: PeftModel,
    samples: Sequence[ReleasedSample],
    *,
    learning_rate: float = 5e-5,
    accumulation: int = 4,
    eta: float = 1.0,
    eta_end: float = 1000.0,
    tau: float = 1.2,
    top_k: int = 50,
    on_update: Callable[[], bool],
) -> None:
    """Train over the samples again and again, until `on_update`, called after every update, says false."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    device = next(model.parameters()).device
    model.train()
    done = 0
    for sample in _forever(samples):
        forget = torch.tensor([sample.forget], device=device)
        with torch.no_grad(), model.disable_adapter():
            base = model(input_ids=forget).logits[0, :-1]
            expert, novice = (
                # Tokens of the context are dropped.
                model(input_ids=torch.cat([torch.tensor([context], device=device), forget], 1)).logits[
                    0, len(context) : -1
                ]
                for context in (sample.expert, sample.novice)
            )
            indices, probs = released_target(base, expert, novice, eta=eta, eta_end=eta_end, tau=tau, top_k=top_k)
        log_probs = model(input_ids=forget).logits[0, :-1].double().log_softmax(-1)
        loss = -(probs * log_probs.gather(-1, indices)).sum(-1).mean()
        (loss / accumulation).backward()

        retain = torch.tensor([sample.retain], device=device)
        with torch.no_grad(), model.disable_adapter():
            labels = model(input_ids=retain).logits[0, :-1].argmax(-1)
        loss = F.cross_entropy(model(input_ids=retain).logits[0, :-1], labels)
        (loss / accumulation).backward()

        synthetic = torch.tensor([sample.synthetic], device=device)
        targets = synthetic.clone()
        targets[:, : sample.completion_start] = -100
        loss = F.cross_entropy(model(input_ids=synthetic).logits[0, :-1], targets[0, 1:])
        (loss / accumulation).backward()

        done += 1
        if done % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
            if not on_update():
                return


def _forever(samples: Sequence[ReleasedSample]) -> Iterator[ReleasedSample]:
    while True:
        yield from samples
