"""Who writes texts to given beginnings: the reference, a second model, or a server that speaks the OpenAI protocol."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError
from huggingface_hub.utils import hf_raise_for_status
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..synthesis import SynthesisConfig, sample_texts


logger = logging.get_logger(__name__)
# A little colder than the model's own distribution: what it says more often is what it knows.
WRITING = SynthesisConfig(plausibility=0.0, temperature=0.8, max_new_tokens=48, batch_size=32)
# Seconds until a server must have answered, how often it is asked in all, and how many prompts at once.
TIMEOUT, TRIES, AT_ONCE = 60.0, 3, 4
# A server takes turns of a conversation, not beginnings of a text.
_TURN = "Continue this text in the same form. Write only what comes next, without comments.\n\n{prompt}"
# What a server answers where another try may help: too many requests, or trouble of its own.
_AGAIN = (429, 500, 502, 503, 504)


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
