"""`ElmDataCollator`: one batch each of forget, retain and synthetic text, with the plan of their packed rows."""

import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin

from ..concept import Concept
from ..files import json_sha256
from .packing import PackingPlan
from .target_store import RowTargets
from .tokens import behind_context, text_ids, text_tokenizer


IGNORE_INDEX = -100


def align(text: Sequence[int], novices: Sequence[Sequence[int]]) -> list[list[int]]:
    """Where counterfactual novices, which may end earlier, stand as a text does: where they predict the same token after the same words.

    For each position of the text that all novices share *after* the first replacement, it gives the position and those of the novices,
    in order. Before it they are the same text, and have nothing to say.
    """
    places = [_places(text, novice) for novice in novices]
    common = set.intersection(*map(set, places)) if places else set()
    return [[place, *(of_novice[place] for of_novice in places)] for place in sorted(common)]


def _places(text: Sequence[int], novice: Sequence[int]) -> dict[int, int]:
    """The positions at which a text and one novice predict the same token, after the first replacement."""
    blocks = SequenceMatcher(None, text, novice, autojunk=False).get_matching_blocks()
    shared = [(block.a + step, block.b + step) for block in blocks for step in range(block.size)]
    # A novice that ends where the next word is asked for has an opinion on it too.
    if shared and shared[-1][1] == len(novice) - 1 and shared[-1][0] + 1 < len(text):
        shared.append((shared[-1][0] + 1, len(novice)))
    same = next((index for index, pair in enumerate(zip(text, novice, strict=False)) if pair[0] != pair[1]), len(text))
    # Words behind the same beginning say nothing about what was replaced.
    return {token - 1: other - 1 for token, other in shared if token and other and (token != other or token > same)}


def of_same_token(
    text: Sequence[int], novices: Sequence[Sequence[int]], aligned: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Those of the positions that [`align`] gave at which the novices have the text's own token: not where a name ends."""
    return [
        [place, *others]
        for place, *others in aligned
        if all(ids[at] == text[place] for ids, at in zip(novices, others, strict=True))
    ]


@dataclass
class ElmDataCollator(DataCollatorMixin):
    """Bundle tokenized rows into `{"forget": batch, "retain": batch, "synthetic": batch}`.

    Each batch holds `input_ids`, `attention_mask` and `labels`, all `[batch, seq]`; labels are -100 on padding and on
    the prompt of a retain text or a synthetic pair. `rows` and `columns`, `[positions]`, are the places that predict a
    label, and `lengths` (a list of ints) the tokens of each row, so that the training step need not search for them.
    Without `targets`, the forget batch also holds `expert` and `novice`: the same texts behind a context, with labels -100
    on the context, `contexts_per_sample` rows to a text in order. With `targets`, it holds what was stored for its rows.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, for its pad token and padding side.
        concepts (`Mapping[str, Concept]`, *optional*):
            Concepts by name, for their contexts. Without it no contexts are added.
        contexts_per_sample (`int`, *optional*, defaults to `1`):
            Expert and novice contexts drawn for a text.
        pad_to_multiple_of (`int`, *optional*):
            Multiple to which sequences are padded.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the contexts: a row always draws the same ones, whatever batch it is in.
        counterfactual (`bool`, *optional*, defaults to `False`):
            Whether forget texts come with counterfactual novices (column `novices` of [`build_erasure_dataset`]). Then
            positions are supervised only where all novices of a text agree with it on the token that follows, and
            without `targets` the forget batch holds `counterfactual`: `index`, `[draws, positions]`, the places of the
            novices in the flattened forget batch followed by the flattened `extra` batch, which holds the novices
            that no forget text begins with, if there are any.
        past_end (`bool`, *optional*, defaults to `False`):
            Whether the position behind a forget text's last token, which has no label, is supervised too, as in the
            released code. Not with `counterfactual`.
        faithful (`bool`, *optional*, defaults to `False`):
            Whether to do what the released code does beside that: supervise the position behind a retain text's last
            token too, leave out the first token of a completion, and draw expert and novice contexts each by itself
            rather than in pairs.
        targets ([`RowTargets`], *optional*):
            What was stored for the rows.
        packing ([`PackingPlan`], *optional*):
            What to pack, which the trainer says when it begins to train. The packing of sub-batches that share a forward
            lies in the first of them, as `packings`.
        behind_names (`bool`, *optional*, defaults to `False`):
            With `counterfactual`, whether positions are supervised only where the novices of a text also have its own token, so
            not at the end of the names that were replaced.
        whole_retain (`bool`, *optional*, defaults to `False`):
            Whether the prompt of a retain text is supervised too.
        keyed (`bool`, *optional*, defaults to `False`):
            Whether each batch holds `keys`, a list of the bytes of each text's token ids, by which the trainer keeps what
            frozen layers give.
    """

    processing_class: PreTrainedTokenizerBase
    concepts: Mapping[str, Concept] | None = None
    contexts_per_sample: int = 1
    pad_to_multiple_of: int | None = None
    seed: int = 0
    counterfactual: bool = False
    past_end: bool = False
    faithful: bool = False
    targets: RowTargets | None = None
    packing: PackingPlan | None = None
    behind_names: bool = False
    whole_retain: bool = False
    keyed: bool = False
    return_tensors: str = "pt"

    def __post_init__(self):
        self.processing_class = text_tokenizer(self.processing_class)

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        batch = super().__call__(features, return_tensors)
        if self.packing is not None:
            self.packing.add(batch)
        return batch

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        only = [[place + 1 for place, *_ in self._aligned(row)] for row in examples] if self.counterfactual else None
        forget = self.pad([(row["forget_ids"], 0) for row in examples], only, past_end=self.past_end)
        starts = [0 if self.whole_retain else row.get("retain_start", 0) for row in examples]
        kept = [(row["retain_ids"], start) for row, start in zip(examples, starts, strict=True)]
        batch = {"forget": forget, "retain": self.pad(kept, past_end=self.faithful)}
        # A concept without synthetic pairs has no part in the consistency term; a batch without any lacks it altogether.
        paired = [row for row in examples if row["synthetic_ids"]]
        if paired:
            batch["synthetic"] = self.pad(
                [(row["synthetic_ids"], row["completion_start"] + self.faithful) for row in paired]
            )
        if self.targets is not None:
            stored = [self.targets[row] for row in examples]
            for name in ("forget", "retain"):
                batch[name]["target"] = {
                    key.removeprefix(f"{name}_"): torch.cat([target[key] for target in stored])
                    for key in stored[0]
                    if key.startswith(name)
                }
        elif self.counterfactual:
            forget["counterfactual"] = self._novices(examples, forget)
        elif self.concepts is not None:
            forget["expert"] = self._in_context(examples, "expert_contexts")
            forget["novice"] = self._in_context(examples, "novice_contexts")
        return batch

    def _aligned(self, row: Mapping[str, Any]) -> list[list[int]]:
        """The aligned positions of a row that are supervised."""
        if not self.behind_names:
            return row["aligned"]
        return of_same_token(row["forget_ids"], row["novices_ids"], row["aligned"])

    def _novices(self, examples: list[dict[str, Any]], forget: dict[str, Any]) -> dict[str, Any]:
        """The counterfactual novices of a batch, each distinct text once."""
        texts = [row["forget_ids"] for row in examples]
        extra: list[list[int]] = []
        where: dict[tuple[int, ...], tuple[bool, int]] = {}
        for row in examples:
            for ids in row["novices_ids"]:
                if tuple(ids) not in where:
                    # What begins a forget text is read there: a causal model sees nothing behind it.
                    host = next((index for index, text in enumerate(texts) if text[: len(ids)] == ids), None)
                    where[tuple(ids)] = (True, len(extra)) if host is None else (False, host)
                    extra += [ids] if host is None else []
        batch = self.pad([(ids, len(ids)) for ids in extra]) if extra else None

        def start(ids: list[int]) -> int:
            """Where a novice begins in the flattened batches."""
            is_extra, index = where[tuple(ids)]
            width = (batch if batch and is_extra else forget)["input_ids"].size(1)
            left = self.processing_class.padding_side == "left"
            padding = width - len(ids if is_extra else texts[index]) if left else 0
            return (forget["input_ids"].numel() if is_extra else 0) + index * width + padding

        places: list[list[int]] = []
        for row in examples:
            starts = [start(ids) for ids in row["novices_ids"]]
            places += [
                [begin + place for begin, place in zip(starts, others, strict=True)]
                for _, *others in self._aligned(row)
            ]
        # No place at all where every text of the batch was cut before its first name.
        draws = len(examples[0]["novices_ids"])
        found: dict[str, Any] = {"index": torch.tensor(places, dtype=torch.long).view(-1, draws).T.contiguous()}
        return found if batch is None else found | {"extra": batch}

    def _in_context(self, examples: list[dict[str, Any]], side: str) -> dict[str, Any]:
        assert self.concepts is not None
        rows = []
        for example in examples:
            contexts = getattr(self.concepts[example["concept"]], side)
            # The same for both sides, so that they draw contexts of the same places, which come in pairs.
            rng = random.Random(f"{self.seed}-{example['row']}" + (f"-{side}" if self.faithful else ""))
            for context in rng.choices(contexts, k=self.contexts_per_sample):
                rows.append(behind_context(self.processing_class, context, example["forget_ids"]))
        return self.pad(rows, past_end=self.past_end)

    def _context_ids(self) -> dict[str, list[list[list[int]]]]:
        """The token ids of all expert and all novice contexts, by concept."""
        return {
            name: [
                [text_ids(self.processing_class, context + "\n") for context in contexts]
                for contexts in (concept.expert_contexts, concept.novice_contexts)
            ]
            for name, concept in (self.concepts or {}).items()
        }

    def longest_context(self) -> int:
        """Tokens of the longest context of all concepts, 0 without any."""
        return max((len(ids) for sides in self._context_ids().values() for side in sides for ids in side), default=0)

    def contexts_digest(self) -> str:
        """SHA-256 over the tokens of all contexts, and over what decides which of them a row draws."""
        drawn = [self._context_ids(), self.contexts_per_sample, self.seed, self.processing_class.bos_token_id]
        return json_sha256(drawn + (["apart"] if self.faithful else []))

    def pad(
        self,
        rows: Sequence[tuple[list[int], int]],
        only: Sequence[Sequence[int]] | None = None,
        *,
        past_end: bool = False,
    ) -> dict[str, Any]:
        """Pad rows of `(token ids, index of the first supervised token)` into one batch; of each row `only` these tokens
        are supervised, if given, and with `past_end` the last position too, though no label follows it.
        """
        width = max(len(ids) for ids, _ in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        # Padding is masked, so any token will do where a tokenizer has none for it.
        input_ids = torch.full((len(rows), width), self.processing_class.pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        left = self.processing_class.padding_side == "left"
        for index, (ids, first) in enumerate(rows):
            start = width - len(ids) if left else 0
            tokens = torch.tensor(ids)
            input_ids[index, start : start + len(ids)] = tokens
            attention_mask[index, start : start + len(ids)] = 1
            if only is None:
                labels[index, start + first : start + len(ids)] = tokens[first:]
            else:
                chosen = torch.tensor(only[index], dtype=torch.long)
                labels[index, start + chosen] = tokens[chosen]
            # The first token of a text has no prediction to supervise; with left padding that would be a pad's.
            labels[index, start] = IGNORE_INDEX
        predicting = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
        if past_end:
            ends = [width - 1 if left else len(ids) - 1 for ids, _ in rows]
            predicting[torch.arange(len(rows)), ends] = True
        rows_index, columns = predicting.nonzero(as_tuple=True)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "rows": rows_index,
            "columns": columns,
            "lengths": [len(ids) for ids, _ in rows],
            **({"keys": [array("q", ids).tobytes() for ids, _ in rows]} if self.keyed else {}),
        }
