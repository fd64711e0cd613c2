"""How texts become tokens and are joined: with one beginning, and without an end that a tokenizer adds."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Any, NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase


Messages: TypeAlias = Sequence[Mapping[str, Any]]  # of a conversation, each with `role` and `content`
# Behind one of these a text that continues another is tokenized, since alone it would begin as a whole text does.
_BEFORE = ("\n", ":")


class TokenizedText(NamedTuple):
    """A text's tokens, and where they end in it."""

    ids: list[int]  # token ids
    # Characters of the text that a token and all before it hold; empty where the tokenizer, not a fast one, cannot tell.
    ends: list[int]
    added: list[bool]  # whether the tokenizer added a token that is not in the text, such as a first one


def text_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, also of a processor that takes images or sound."""
    from transformers import ProcessorMixin  # which takes seconds, with torch

    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def conversation(
    processing_class: PreTrainedTokenizerBase | None, messages: Messages, begin_answer: bool = False
) -> str:
    """Messages as one text, by the chat template where there is one; with `begin_answer`, up to where the answer begins."""
    tokenizer = text_tokenizer(processing_class)
    if tokenizer is None or tokenizer.chat_template is None:
        turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
        return "\n".join([*turns, "Assistant:"] if begin_answer else turns)
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=begin_answer))


def tokenize(processing_class: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[TokenizedText]:
    """Tokenize texts as a model is to read them, whichever tokens the tokenizer adds at either end.

    What it adds in front stands there once, also where the text (of a chat template, say) begins with it. What it adds
    behind is left out: most texts are continued, and a text that ends says so itself.
    """
    tokenizer = text_tokenizer(processing_class)
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        return_offsets_mapping=tokenizer.is_fast,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,  # texts may be longer than the model takes; they are cut later
    )
    offsets = encoded["offset_mapping"] if tokenizer.is_fast else [[]] * len(texts)
    return [
        _without_end(tokenizer, *row)
        for row in zip(encoded["input_ids"], offsets, encoded["special_tokens_mask"], strict=True)
    ]


def _without_end(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], offsets: list[tuple[int, int]], mask: list[int]
) -> TokenizedText:
    own = [index for index, added in enumerate(mask) if not added]
    if own:
        first, last = own[0], own[-1] + 1
    else:
        # Of an empty text all tokens are added, and only their names tell which would stand behind it.
        first, last = 0, int(ids[:1] == [tokenizer.bos_token_id])
    start = first if ids[first : 2 * first] == ids[:first] else 0
    ends = list(accumulate((end for _, end in offsets[start:last]), max))
    return TokenizedText(list(ids[start:last]), ends, [bool(added) for added in mask[start:last]])


def text_ids(processing_class: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of one text, as [`tokenize`] gives them."""
    return tokenize(processing_class, [text])[0].ids


def tokenize_pairs(
    processing_class: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], int]]:
    """Tokenize each prompt and completion as one text, so that no artificial token boundary arises between them: the token ids, and
    the index of the first token that holds a character of the completion (a token across the seam counts as completion).
    """
    tokenized = []
    texts = tokenize(processing_class, [prompt + completion for prompt, completion in pairs])
    for (prompt, _), text in zip(pairs, texts, strict=True):
        if text.ends or not text.ids:
            start = next((index for index, end in enumerate(text.ends) if end > len(prompt)), len(text.ids))
        else:
            start = common_prefix(text_ids(processing_class, prompt), text.ids)
        tokenized.append((text.ids, start))
    return tokenized


def tokenize_pair(processing_class: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], int]:
    """One pair of [`tokenize_pairs`]."""
    return tokenize_pairs(processing_class, [(prompt, completion)])[0]


def behind_context(
    processing_class: PreTrainedTokenizerBase, context: str, text: Sequence[int]
) -> tuple[list[int], int]:
    """A text, given as token ids, behind a line of context: the same tokens, and one beginning at the head of both. With it comes the
    index of the first token that is predicted without the context too.
    """
    tokenizer = text_tokenizer(processing_class)
    context_tokens = tokenize(tokenizer, [context + "\n"])[0]
    added = sum(context_tokens.added)
    begin = context_tokens.ids[:added]
    if not begin and tokenizer.bos_token_id in text[:1] and tokenizer.bos_token_id not in text[1:]:
        begin = [tokenizer.bos_token_id]  # of a chat template; a token that returns opens a turn
    rest = list(text)[len(begin) :] if list(text[: len(begin)]) == begin else list(text)
    ids = [*begin, *context_tokens.ids[added:]]
    # Without a context nothing predicts a text's first token.
    return ids + rest, len(ids) + (len(rest) == len(text))


def continuation_ids(processing_class: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text that continues another, tokenized apart from it.

    Some tokenizers put a space before a text's first word, which does not belong there behind another text.
    """
    tokenizer = text_tokenizer(processing_class)
    for before in _BEFORE:
        head, whole = (text_ids(tokenizer, part) for part in (before, before + text))
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def continuation_text(processing_class: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens that were generated behind others, without special tokens.

    They are decoded together: alone, some tokenizers would leave out the space before a text's first word.
    """
    tokenizer = text_tokenizer(processing_class)
    head, whole, alone = (
        str(tokenizer.decode(list(part), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for part in (before, [*before, *ids], ids)
    )
    return whole.removeprefix(head) if whole.startswith(head) else alone


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))
