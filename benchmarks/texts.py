"""Texts that benchmarks train on: three to a sample, of one length."""

import json
import random
from collections.abc import Sequence

from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from elm_trainer import ConceptSources, build_erasure_dataset, load_texts


_PROMPT = 40


def released_texts(samples: int, characters: int = 700) -> Dataset:
    """Samples of the shape that the released code trains on: forget, retain and synthetic text of 700 characters each.

    The sentences are the built-in ones, joined and cut.
    """
    forget = _joined(load_texts("capitals")["text"], characters, samples)
    retain = _joined(load_texts("everyday")["text"], characters, samples)
    more = _joined(load_texts("countries")["text"], characters - _PROMPT, samples)
    pairs = [(text[:_PROMPT], completion) for text, completion in zip(forget, more, strict=True)]
    return _dataset(forget, retain, pairs, samples)


def short_texts(samples: int, words: int = 12, seed: int = 0) -> Dataset:
    """Samples of short synthetic texts, every one another: random words of the built-in texts."""
    rng = random.Random(seed)
    vocabulary = sorted({word for text in load_texts("everyday-held-out")["text"] for word in text.split()})

    def draw() -> list[str]:
        return [" ".join(rng.choices(vocabulary, k=words)) for _ in range(samples)]

    forget, retain, more = draw(), draw(), draw()
    pairs = [(prompt, f" {completion}") for prompt, completion in zip(_halves(forget), _halves(more), strict=True)]
    return _dataset(forget, retain, pairs, samples)


def cut_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerBase:
    """A byte-pair tokenizer of the first `size` tokens, which is what it was after so many merges were learned.

    Args:
        tokenizer: Tokenizer, which is given back if it has no more tokens than that.
        size (`int`): Tokens that are kept; those of single bytes must be among them.
    """
    if len(tokenizer) <= size:
        return tokenizer
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {token: index for token, index in record["model"]["vocab"].items() if index < size}
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in record["model"]["merges"])
    kept = [pair for pair in pairs if {*pair, "".join(pair)} <= tokens.keys()]
    record["model"] |= {"vocab": tokens, "merges": kept}
    record["added_tokens"] = [token for token in record["added_tokens"] if token["id"] < size]
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if token in tokens}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(record)), **special)


def _halves(texts: Sequence[str]) -> list[str]:
    return [" ".join(text.split()[: len(text.split()) // 2]) for text in texts]


def _joined(texts: Sequence[str], characters: int, count: int) -> list[str]:
    joined, place = [], 0
    for _ in range(count):
        text = ""
        while len(text) < characters:
            text += texts[place % len(texts)] + "\n"
            place += 1
        joined.append(text[:characters])
    return joined


def _dataset(forget: list[str], retain: list[str], pairs: list[tuple[str, str]], samples: int) -> Dataset:
    return build_erasure_dataset({"capitals": ConceptSources(forget, [retain], pairs)}, size=samples)
