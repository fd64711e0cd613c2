"""Whether a tokenizer has to be published, because the base model's own would not do."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def tokenizer_changed(tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn some text into other tokens, or some chat into other text.

    Compared are vocabulary and rules, special tokens, and the chat template. A padding token that one of the base's
    tokens serves as is no change, as training sets one where there is none and no model sees it; neither are padding
    side, truncation and the longest length, which belong to a call.
    """
    return _behaviour(tokenizer) != _behaviour(base)


def _behaviour(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules["padding"] = rules["truncation"] = None
    else:
        added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "added": added}
    return {
        "rules": rules,
        "special": {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"},
        "extra": sorted(map(str, tokenizer.extra_special_tokens)),
        "chat_template": tokenizer.chat_template,
    }
