"""`ElmDataCollator`: one batch each of forget, retain and synthetic text."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin

from ..concept import Concept


IGNORE_INDEX = -100


def tokenize_pair(processing_class: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], int]:
    """Tokenise prompt and completion as one text, so that no artificial token boundary arises between them.

    Returns:
        `tuple[list[int], int]`: the token ids, and the index of the first token that holds a character of the
        completion (a token across the seam counts as completion and is supervised).
    """
    encoding = processing_class(prompt + completion, return_offsets_mapping=True)
    ends = [end for _, end in encoding["offset_mapping"]]
    start = next((index for index, end in enumerate(ends) if end > len(prompt)), len(ends))
    return encoding["input_ids"], start


@dataclass
class ElmDataCollator(DataCollatorMixin):
    """Bundle tokenised rows into `{"forget": batch, "retain": batch, "synthetic": batch}`.

    Each batch holds `input_ids`, `attention_mask` and `labels`, all `[batch, seq]`; labels are -100 on padding and on
    the prompt of a synthetic pair. `rows` and `columns`, `[positions]`, are the places that predict a label, and
    `lengths` (a list of ints) the tokens of each row, so that the training step need not search for them. Without `targets`, the forget batch also holds `expert` and `novice`: the same
    texts behind a context, with labels -100 on the context, `contexts_per_sample` rows to a text in order. With
    `targets`, it holds what was stored for its rows.

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
    """

    processing_class: PreTrainedTokenizerBase
    concepts: Mapping[str, Concept] | None = None
    contexts_per_sample: int = 1
    pad_to_multiple_of: int | None = None
    seed: int = 0
    targets: Sequence[Mapping[str, torch.Tensor]] | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        forget = self.pad([(row["forget_ids"], 0) for row in examples])
        batch = {"forget": forget, "retain": self.pad([(row["retain_ids"], 0) for row in examples])}
        # A concept without synthetic pairs has no part in the consistency term; a batch without any lacks it altogether.
        if pairs := [(row["synthetic_ids"], row["completion_start"]) for row in examples if row["synthetic_ids"]]:
            batch["synthetic"] = self.pad(pairs)
        if self.targets is not None:
            stored = [self.targets[row["row"]] for row in examples]
            for name in ("forget", "retain"):
                batch[name]["target"] = {
                    key.removeprefix(f"{name}_"): torch.cat([target[key] for target in stored])
                    for key in stored[0]
                    if key.startswith(name)
                }
        elif self.concepts is not None:
            forget["expert"] = self._in_context(examples, "expert_contexts")
            forget["novice"] = self._in_context(examples, "novice_contexts")
        return batch

    def _in_context(self, examples: list[dict[str, Any]], side: str) -> dict[str, Any]:
        assert self.concepts is not None
        rows = []
        for example in examples:
            contexts = getattr(self.concepts[example["concept"]], side)
            rng = random.Random(f"{self.seed}-{side}-{example['row']}")
            for context in rng.choices(contexts, k=self.contexts_per_sample):
                # Apart from the text, so that its tokens are the same with and without a context.
                ids = self.processing_class(context + "\n")["input_ids"]
                text = example["forget_ids"]
                if text[0] == self.processing_class.bos_token_id and ids[0] == text[0]:
                    rows.append((ids + text[1:], len(ids)))
                else:
                    # The text's first token is not supervised: without a context nothing predicts it.
                    rows.append((ids + text, len(ids) + 1))
        return self.pad(rows)

    def pad(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
        """Pad rows of `(token ids, index of the first supervised token)` into one batch."""
        width = max(len(ids) for ids, _ in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(rows), width), self.processing_class.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        left = self.processing_class.padding_side == "left"
        for index, (ids, first) in enumerate(rows):
            start = width - len(ids) if left else 0
            tokens = torch.tensor(ids)
            input_ids[index, start : start + len(ids)] = tokens
            attention_mask[index, start : start + len(ids)] = 1
            labels[index, start + first : start + len(ids)] = tokens[first:]
            # The first token of a text has no prediction to supervise; with left padding that would be a pad's.
            labels[index, start] = IGNORE_INDEX
        rows_index, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "rows": rows_index,
            "columns": columns,
            "lengths": [len(ids) for ids, _ in rows],
        }
