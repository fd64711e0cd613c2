"""A random state of an attack's own, so that the caller's is untouched."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import set_seed


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python, numpy and torch, and give all three their state back afterwards."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
