"""What stands in for models and data sets of the Hub: their configs with tokenizers that work alike, and texts in their columns.

The configs hold the published values; each gives the number of weights that the Hub names.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from ..like import byte_level, gemma, llama2, llama3, metaspace


class Model(NamedTuple):
    """A model on the Hub.

    Attributes:
        id (`str`): Where it is.
        weights (`int`): Its weights, as its page there counts them.
        begins (`bool`): Whether its tokenizer begins texts with BOS.
        pads (`bool`): Whether it has a token for padding.
        template (`bool`): Whether it has a chat template.
        tokenizer (`PreTrainedTokenizerFast`): A small one that does the same.
    """

    id: str
    weights: int
    begins: bool
    pads: bool
    template: bool
    tokenizer: PreTrainedTokenizerFast

    @property
    def says(self) -> list[str]:
        """What `elm doctor` has to say of the tokenizer."""
        begins = "begins texts with" if self.begins else "does not begin texts with"
        pads = "pads with" if self.pads else "no pad token"
        return [begins, pads, ", chat template" if self.template else "no chat template"]


def _with(tokenizer: PreTrainedTokenizerFast, **given: str | None) -> PreTrainedTokenizerFast:
    for name, value in given.items():
        setattr(tokenizer, name, value)
    return tokenizer


_TURNS = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
MODELS = {
    "zephyr-7b-beta": Model(
        "HuggingFaceH4/zephyr-7b-beta", 7_241_732_096, True, True, True,
        _with(metaspace("<s> $A", template=_TURNS), pad_token="</s>"),
    ),
    "mistral-7b": Model(
        "mistralai/Mistral-7B-v0.1", 7_241_732_096, True, False, False, _with(metaspace("<s> $A"), pad_token=None)
    ),
    "llama-2-7b-chat": Model(
        "meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, True, False, True, _with(llama2(), pad_token=None)
    ),
    "llama-3-8b-instruct": Model(
        "meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248, True, False, True, _with(llama3(), pad_token=None)
    ),
    "qwen3-8b": Model(
        "Qwen/Qwen3-8B", 8_190_735_360, False, True, True,
        _with(byte_level(special=("<|end|>", "<|pad|>"), eos_token="<|end|>", pad_token="<|pad|>"), chat_template=_TURNS),
    ),
    "gemma-3-4b-it": Model("google/gemma-3-4b-it", 4_300_079_472, True, True, True, gemma()),
    "olmo-2-7b": Model(
        "allenai/OLMo-2-1124-7B", 7_298_617_344, False, True, False,
        byte_level(special=("<|end|>", "<|pad|>"), eos_token="<|end|>", pad_token="<|pad|>"),
    ),
}  # fmt: skip


def config(name: str) -> dict[str, Any]:
    """The config of a model, as on the Hub."""
    return json.loads((Path(__file__).parent / "configs" / f"{name}.json").read_text(encoding="utf-8"))


def sizes(name: str) -> dict[str, Any]:
    """That of its text decoder."""
    whole = config(name)
    return whole.get("text_config", whole)


def narrow(name: str, layers: int) -> dict[str, Any]:
    """The config of the same architecture with so many layers, few of everything else, and the tokens of the stand-in."""
    small = config(name)
    text = small.get("text_config", small)
    text |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2 if text["num_key_value_heads"] < sizes(name)["num_attention_heads"] else 4}
    text |= {key: 8 for key in ("head_dim", "sliding_window") if text.get(key)}
    tokenizer = MODELS[name].tokenizer
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **ends}
    if "vision_config" in small:
        small["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        small["vision_config"] |= {"num_hidden_layers": layers, "image_size": 28}
        small |= {"mm_tokens_per_image": 4, "image_token_index": 1, "boi_token_index": 1, "eoi_token_index": 1, **ends}
    return small


def save(config: dict[str, Any], name: str, folder: Path) -> Path:
    """A folder with a config and the stand-in for its tokenizer, as of a model without weights."""
    MODELS[name].tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_WORDS = "New York and Oslo and Rome are a town of the stick in Millbrook".split()
# Data sets that the recipes name, by id and config, with their splits and columns.
DATASETS = {
    ("cais/wmdp-bio-forget-corpus", None): ("train", ("title", "abstract", "text", "doi")),
    ("cais/wmdp-corpora", "cyber-forget-corpus"): ("train", ("text",)),
    ("cais/wmdp-corpora", "bio-retain-corpus"): ("train", ("text",)),
    ("cais/wmdp-corpora", "cyber-retain-corpus"): ("train", ("text",)),
    ("mickume/harry_potter_tiny", None): ("train", ("text",)),
    ("philschmid/easyrag-mini-wikipedia", "documents"): ("full", ("document", "id")),
}


def load_dataset(name: str, config: str | None = None, **given: Any) -> Dataset:
    """In place of that of `datasets`: short texts in a data set's columns, different in each; files are read as ever."""
    if "data_files" in given:
        return datasets.load_dataset(name, config, **given)
    whole, columns = DATASETS[name, config]
    assert given["split"].partition("[")[0] == whole
    start = [*DATASETS].index((name, config))
    texts = [" ".join(_WORDS[(start + 3 * row + i) % len(_WORDS)] for i in range(9 + row)) for row in range(8)]
    return Dataset.from_dict({column: [f"{text} {column}" for text in texts] for column in columns})
