"""Read a GGUF file once, where transformers would read it for the config, the weights and the tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import gguf
import numpy as np


class _QuickReader(gguf.GGUFReader):
    """Reads what the parent class reads, without making a memory map of every number and letter of a vocabulary."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if override_order is not None or self.byte_order != "I":
            return super()._get(offset, dtype, count, override_order)
        return np.frombuffer(self.data, dtype, int(count), offset)


@contextmanager
def reading_gguf_once() -> Iterator[None]:
    """While this holds, transformers parses a GGUF file once, and makes the map of a model's tensor names once.

    Otherwise it parses the file for the config, for the weights and for the tokenizer, and makes the map for every
    module: 19 s of loading the demo model on two cores, in place of 3.
    """
    usual = gguf.GGUFReader, gguf.get_tensor_name_map
    if not isinstance(gguf.GGUFReader, type):  # within another of these
        yield
        return
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(_QuickReader), cache(usual[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = usual
