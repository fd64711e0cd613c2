"""Who writes texts to given beginnings (the reference, a second model, or a server), and what of the texts and lists can be used."""

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError
from huggingface_hub.utils import hf_raise_for_status
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.facts import own_yaml
from ..evaluation.fluency import as_prompt, repetition
from ..synthesis import SynthesisConfig, sample_texts
from .documents import normalized, whole_sentences, without_duplicates


logger = logging.get_logger(__name__)
# A little colder than the model's own distribution: what it says more often is what it knows.
WRITING = SynthesisConfig(plausibility=0.0, temperature=0.8, max_new_tokens=48, batch_size=32)
# Seconds until a server must have answered, how often it is asked in all, and how many prompts at once.
TIMEOUT, TRIES, AT_ONCE = 60.0, 3, 4
# A server takes turns of a conversation, not beginnings of a text.
_TURN = "Continue this text in the same form. Write only what comes next, without comments.\n\n{prompt}"
# What a server answers where another try may help: too many requests, or trouble of its own.
_AGAIN = (429, 500, 502, 503, 504)
# Tokens of a list, and words of a name in it.
_LIST_TOKENS, _WORDS_OF_NAME = 48, 4
# Lists of further names that are drawn at once, how often from what was drawn before, and most names.
_FURTHER, _ROUNDS, _MOST_FURTHER = 16, 5, 160
_NO_NAME = re.compile(
    r"^(?:it|this|that|these|those|they|he|she|we|you|all|many|some|each|every|a|an|one|any|not|also|very)\b", re.I
)


@dataclass
class Writer:
    """Continues texts, with a model of this process or with one behind a server."""

    name: str  # what it is called in records: name of the model, or address of the server
    model: PreTrainedModel | None = None  # the model; `None` for a server
    processing_class: PreTrainedTokenizerBase | None = None  # its tokenizer
    client: InferenceClient | None = None  # the server's client; `None` for a model
    model_id: str = ""  # what the server calls its model
    cache_dir: str | Path | None = None  # where a model's finished batches are kept, from which a second call goes on
    fingerprint: str = ""  # what identifies the model there

    def write(
        self, prompts: Sequence[str], *, max_new_tokens: int = 64, temperature: float = 0.7, seed: int = 0
    ) -> list[str]:
        """How each text goes on, without the beginning; the seed counts as far as a server heeds it.

        Raises:
            TimeoutError: if a server has not answered within 60 s, three times.
            OSError: if a server cannot be reached, or refuses.
            ValueError: if it answers without a text.
        """
        if self.client is not None:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                seeded = [(prompt, max_new_tokens, temperature, seed + n) for n, prompt in enumerate(prompts)]
                asked = [pool.submit(self._ask, *settings) for settings in seeded]
                try:
                    return [one.result() for one in asked]
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        config = replace(WRITING, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        # Batches of like lengths waste little on padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found = self.sample([prompts[index] for index in order], config)
        texts = {index: text.removeprefix(prompts[index]) for index, text in zip(order, found, strict=True)}
        return [texts[index] for index in range(len(prompts))]

    def sample(self, prompts: Sequence[str], config: SynthesisConfig) -> list[str]:
        """Each beginning with how a model of this process goes on, sampled in this order."""
        return sample_texts(
            self.model, self.processing_class, prompts, config, cache_dir=self.cache_dir, fingerprint=self.fingerprint
        )

    def _ask(self, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
        """One continuation from the server."""
        answer = self._tried(lambda client: client.chat_completion(
            [{"role": "user", "content": _TURN.format(prompt=prompt)}], model=self.model_id,
            max_tokens=max_new_tokens, temperature=temperature, seed=seed,
        ))  # fmt: skip
        choices = getattr(answer, "choices", None)
        text = choices[0].message.content if choices else None
        if not isinstance(text, str):
            raise ValueError(f"`writer` is {self.name!r}, which answered without a text: is it a chat model?")
        # Some begin with the line that they are to continue.
        last = prompt.rpartition("\n")[2]
        text = text.lstrip()
        return text.removeprefix(last) if text.startswith(last) else f" {text}"

    def _tried(self, ask: Any) -> Any:
        for trial in range(1, TRIES + 1):
            try:
                return ask(self.client)
            except (OSError, httpx2.TransportError) as error:
                told = " ".join(str(error).split())[:200]
                code = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if code is not None and code not in _AGAIN:
                    what = "OPENAI_API_KEY" if code in (401, 403) else "address and model, 'http://host:port/v1#MODEL'"
                    raise OSError(f"`writer` is {self.name!r}, which refused ({told}): check {what}.") from error
                if trial == TRIES:
                    # The oldest huggingface-hub lets the error of its client through.
                    late = isinstance(error, (InferenceTimeoutError, httpx2.TimeoutException))
                    what = f"has not answered within {TIMEOUT:.0f} s" if late else f"failed ({told})"
                    told = f"`writer` is {self.name!r}, which {what}, {TRIES} times: is the server running?"
                    raise (TimeoutError if late else OSError)(told) from error
                logger.warning(f"`writer` {self.name}: {told}; trying again ({trial} of {TRIES}).")
                time.sleep(2.0 ** (trial - 1))
        raise AssertionError


def load_writer(name: str, *, cache_dir: str | Path | None = None, device: Any = None) -> Writer:
    """A writer by name.

    Args:
        name (`str`):
            Whatever [`load_model_and_tokenizer`] takes: a folder, a Hub id, a built-in model; or the address of a server that speaks
            the OpenAI protocol, `"http://host:port/v1"`, with `#MODEL` behind it where it serves several. The environment variable
            `OPENAI_API_KEY` holds its key, where it wants one.
        cache_dir (`str` or `Path`, *optional*): Where a model's finished batches are kept.
        device (`torch.device` or `str`, *optional*): Where a model is put.

    Raises:
        OSError: if there is no such model, or the server cannot be reached or refuses.
        ValueError: if the server says of no model what it is called.
    """
    if not name.startswith(("http://", "https://")):
        from ..fingerprint import model_fingerprint
        from ..modeling import load_model_and_tokenizer

        model, tokenizer = load_model_and_tokenizer(name)
        model = model.to(device) if device is not None else model
        return Writer(name, model, tokenizer, cache_dir=cache_dir, fingerprint=model_fingerprint(model))
    address, _, model_id = name.partition("#")
    address = address.rstrip("/")
    # Without a key of its own the client would send the Hub's.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    client = InferenceClient(base_url=address, api_key=key, timeout=TIMEOUT)
    writer = Writer(address, client=client, model_id=model_id)
    if not model_id:

        def models(_: InferenceClient) -> Any:
            response = get_session().get(
                f"{address}/models", headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT
            )
            hf_raise_for_status(response)
            return response.json()

        served = writer._tried(models)
        try:
            writer.model_id = served["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"`writer` is {name!r}, which lists no models: name one behind the address, '{address}#MODEL'."
            ) from None
    return writer


def writing_prompts() -> dict[str, Any]:
    """The prompts of `data/texts/writing.yaml`."""
    return own_yaml("texts/writing.yaml")


class Begun(NamedTuple):
    """What a model is given to go on with: the whole, whom it is about, and the line that it goes on, which a turn of chat has none of."""

    prompt: str
    name: str
    line: str


def begun_about(
    processing_class: PreTrainedTokenizerBase,
    names: Sequence[str],
    plain: Sequence[str],
    chat: Sequence[str],
    count: int,
) -> list[Begun]:
    """`count` beginnings, half of them as a conversation where the model has one: all names in the first form, then all in the next."""
    filled = []
    for index in range(count):
        turn, place = divmod(index, len(names))
        name = names[place]
        chosen = chat[turn // 2 % len(chat)] if turn % 2 else plain[turn // 2 % len(plain)]
        text = chosen.format(name=name, Name=name[:1].upper() + name[1:])
        line = "" if turn % 2 else text.rpartition("\n")[2]
        filled.append(Begun(as_prompt(processing_class, text) if turn % 2 else text, name, line))
    # Batches of like lengths waste little on padding.
    return sorted(filled, key=lambda begun: len(begun.prompt))


def sift(
    prompts: Sequence[str], texts: Sequence[str], fits: Callable[[str], bool], config: SynthesisConfig
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """The texts that can be used, beginnings included, as rows of `text` and `prompt`, and how many cannot for which reason: `fits` says
    whether what stands behind the beginning speaks of what it should.
    """
    dropped = {"short": 0, "repetition": 0, "topic": 0}
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        new = whole_sentences(text.removeprefix(prompt))
        if len(new.split()) < config.min_words:
            dropped["short"] += 1
        elif repetition(new) > config.max_repetition:
            dropped["repetition"] += 1
        elif not fits(new):
            dropped["topic"] += 1
        else:
            found.append((prompt, new))
    kept, twice = without_duplicates([new for _, new in found])
    rows = [{"text": found[index][0] + found[index][1], "prompt": found[index][0]} for index in kept]
    return rows, dropped | twice


def is_name(text: str, words: int) -> bool:
    """Whether a text can be a subject or an answer: of few words, and not the beginning of a sentence."""
    return 0 < len(text.split()) <= words and bool(re.search(r"\w", text)) and not _NO_NAME.match(text)


def _listed(text: str) -> list[str]:
    """The names in the rest of a line, each once."""
    line, whole, _ = text.partition("\n")
    # The last one is cut off where the line has no end.
    names = [name.strip(" ,.;\"'*") for name in re.split(r",(?: and)? ", line)[: None if whole else -1]]
    names = [re.sub(r"^(?:and |or )|^the (?=[A-Z])|\s*\([^)]*\)?|\)", "", name) for name in names]
    # It may stammer: "China China", "China/China".
    return [
        name
        for name in dict.fromkeys(names)
        if is_name(name, _WORDS_OF_NAME) and len({*re.split(r"[ /]", name)}) == len(re.split(r"[ /]", name))
    ]


def agreed_names(writer: Writer, prompts: Sequence[str], counts: Callable[[str, str], bool], seed: int) -> list[str]:
    """Names that are listed behind two prompts or more, most often first; `counts` says which one does behind a prompt."""
    lists = zip(prompts, writer.write(prompts, max_new_tokens=_LIST_TOKENS, seed=seed), strict=True)
    names = (name for prompt, text in lists for name in _listed(text) if counts(prompt, name))
    return [name for name, count in most_named(names, normalized) if count >= 2]


def most_named(names: Iterable[str], key: Callable[[str], str]) -> list[tuple[str, int]]:
    """Names as they are spelled first, and how often one with the same key comes, the most frequent first."""
    counts: Counter[str] = Counter()
    spelled: dict[str, str] = {}
    for name in names:
        counts[key(name)] += 1
        spelled.setdefault(key(name), name)
    return [(spelled[name], count) for name, count in counts.most_common()]


def further_names(writer: Writer, known: Sequence[str], rng: random.Random, *, seed: int = 0) -> list[str]:
    """Names of the same kind as those that are known, each of which was listed twice or more, the most frequent first. `rng` draws which
    names each list goes on from.
    """
    listed: Counter[str] = Counter()
    spelled = {normalized(name): name for name in known}
    own = {*spelled}
    for turn in range(_ROUNDS):
        pool = [name for key, name in spelled.items() if key in own or listed[key] > 1]
        prompts = [
            writing_prompts()["further"].format(some=", ".join(rng.sample(pool, min(6, len(pool)))))
            for _ in range(_FURTHER)
        ]
        for text in writer.write(prompts, max_new_tokens=_LIST_TOKENS, temperature=1.0, seed=seed + 10 + turn):
            for name in _listed(text):
                listed[normalized(name)] += 1
                spelled.setdefault(normalized(name), name)
    return [spelled[key] for key, count in listed.most_common() if count > 1 and key not in own][:_MOST_FURTHER]
