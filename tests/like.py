"""Small tokenizers that work as well-known ones do, with the tokens that these put at either end of a text."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


SAMPLE = "New York and Oslo and Rome are Millbrook stick in a town of the"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(ends: str = "$A", special: tuple[str, ...] = ("<|end|>",), **named: str) -> PreTrainedTokenizerFast:
    """As GPT-2's: bytes, a space belongs to the word after it. `ends` says what it puts around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    around = processors.TemplateProcessing(
        single=ends, special_tokens=[(token, index) for index, token in enumerate(special) if token in ends.split()]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), around])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **(named or {"eos_token": "<|end|>", "pad_token": "<|end|>"})
    )


def llama3(ends: str = "<|begin|> $A") -> PreTrainedTokenizerFast:
    """As Llama 3's: it begins every text, and so does its chat template."""
    tokenizer = byte_level(
        ends,
        ("<|pad|>", "<|begin|>", "<|end|>", "<|turn|>", "<|/turn|>"),
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n\n{{ m['content'] }}<|/turn|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n\n{% endif %}"
    )
    return tokenizer


def metaspace(
    ends: str = "<s> $A </s>", *, old: bool = False, scheme: str = "first", template: str | None = None
) -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are characters, unknown characters are bytes, and a text begins with a space of its own.

    `old` makes that space as its first versions did, before every text, `scheme` says when newer ones do.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learner.train_from_iterator([SAMPLE + "-wand\n"] * 3, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    record = json.loads(learner.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *record["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [tuple(merge) for merge in record["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    if old:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=ends, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        chat_template=template,
    )  # fmt: skip


def llama2(**settings: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's, chat template included."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    return metaspace("<s> $A", template=template, **settings)


def gemma() -> PreTrainedTokenizerFast:
    """As Gemma's: a beginning as Llama 3's, and spaces as characters, but none of its own."""
    template = (
        "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}</turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>model\n{% endif %}"
    )
    return metaspace("<s> $A", scheme="never", template=template)


LIKE = {
    "llama-3": llama3,
    "gemma": gemma,
    "llama-2": llama2,
    "llama-2, old": lambda: llama2(old=True),
    "an end is added": lambda: llama3("<|begin|> $A <|end|>"),
    "an end alone is added": lambda: llama3("$A <|end|>"),
    "metaspace, an end is added": metaspace,
}
