"""How token ids and probabilities are written in few bytes."""

import torch


# An unsigned float of 24 bits: 6 of exponent and 18 of mantissa, which are those of float32 shifted, so that exponent 63
# stands for [1, 2) and code 0 for zero.
PROB_BYTES = 3
_MANTISSA_CUT = 23 - 18
_EXPONENT_SHIFT = (127 - 63) << 23
_NOT_FINITE = "the model's logits are not finite. Load it in float32, or set `bf16` in place of `fp16`."


def encode_probs(probs: torch.Tensor) -> torch.Tensor:
    """Round probabilities to 24 bits.

    The relative error is at most `2^-19`; 0 and 1 are exact, and what is at most `2^-63` becomes 0. (float16 would be off
    by `2^-11`, which moves a loss by more than 1e-4.)

    Args:
        probs (`torch.Tensor`): Values from 0 to below 2, in float32, any shape.

    Returns:
        `torch.Tensor`: their codes in uint8, `[..., 3]`, least byte first.

    Raises:
        FloatingPointError: if a value is NaN, negative or 2 and more.
    """
    probs = probs.float().contiguous()
    if not bool(((probs >= 0) & (probs < 2)).all()):
        raise FloatingPointError(f"A target holds probabilities that are NaN or outside of [0, 1]: {_NOT_FINITE}")
    bits = probs.view(torch.int32)
    half = (1 << (_MANTISSA_CUT - 1)) - 1
    # To nearest, ties to even. A carry out of the mantissa raises the exponent, as it should.
    codes = (bits - _EXPONENT_SHIFT + half + ((bits >> _MANTISSA_CUT) & 1)) >> _MANTISSA_CUT
    return _to_bytes(codes.clamp(0, (1 << 24) - 1), PROB_BYTES)


def decode_probs(packed: torch.Tensor) -> torch.Tensor:
    """The float32 values, `[...]`, of codes `[..., 3]`."""
    codes = _from_bytes(packed)
    bits = torch.where(codes == 0, 0, (codes << _MANTISSA_CUT) + _EXPONENT_SHIFT)
    return bits.view(torch.float32)


def encode_floats(values: torch.Tensor) -> torch.Tensor:
    """Values as they are, in float32.

    Raises:
        FloatingPointError: if a value is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"A target holds values that are NaN or infinite: {_NOT_FINITE}")
    return values.float()


def id_bytes(vocab_size: int) -> int:
    """Bytes that a token id takes: 2 where the vocabulary has at most 65,536 tokens, else 3.

    Raises:
        ValueError: for more than `2^24` tokens.
    """
    if vocab_size > 1 << 24:
        raise ValueError(
            f"`vocab_size` is {vocab_size}, but ids are stored in at most 3 bytes: up to {1 << 24} tokens."
        )
    return 2 if vocab_size <= 1 << 16 else 3


def encode_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Token ids as uint16 `[...]`, or where the vocabulary does not fit as uint8 `[..., 3]`, least byte first.

    Raises:
        ValueError: if an id is no token of the vocabulary.
    """
    if not bool(((ids >= 0) & (ids < vocab_size)).all()):
        raise ValueError(
            f"A target names token ids from {int(ids.min())} to {int(ids.max())}, but there are {vocab_size}."
        )
    return ids.to(torch.uint16) if id_bytes(vocab_size) == 2 else _to_bytes(ids.int(), 3)


def decode_ids(packed: torch.Tensor) -> torch.Tensor:
    """The ids in int64, `[...]`."""
    return packed.long() if packed.dtype == torch.uint16 else _from_bytes(packed).long()


def _to_bytes(values: torch.Tensor, count: int) -> torch.Tensor:
    """The lowest bytes of int32 values, uint8 `[..., count]`, the same on every machine."""
    return torch.stack([(values >> (8 * place)) & 0xFF for place in range(count)], -1).to(torch.uint8)


def _from_bytes(packed: torch.Tensor) -> torch.Tensor:
    values = packed[..., 0].int()
    for place in range(1, packed.size(-1)):
        values |= packed[..., place].int() << (8 * place)
    return values
