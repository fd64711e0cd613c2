"""An erased model beside its reference: what every measurement and attack is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..modeling import adapter_disabled, evaluating


Side: TypeAlias = Literal["reference", "erased"]
SIDES: tuple[Side, ...] = ("reference", "erased")


class ModelPair:
    """The erased model and the reference it came from.

    Args:
        erased ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Erased model: an adapter on its base, a merged model, or any full checkpoint.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            Model before the erasure. Left out for a `PeftModel`, whose base is the reference.

    Raises:
        TypeError: if one is no model, such as its name.
        ValueError: if there is no reference, or its vocabulary is another one.
    """

    def __init__(self, erased: PreTrainedModel | PeftModel, reference: PreTrainedModel | PeftModel | None = None):
        for name, model in (("erased", erased), ("reference", reference)):
            if not isinstance(model, nn.Module) and not (name == "reference" and model is None):
                raise TypeError(
                    f"`{name}` is of type {type(model).__name__}, which is no model: load it with `load_model_and_tokenizer` or "
                    "`load_erased`."
                )
        if reference is None and not isinstance(erased, PeftModel):
            raise ValueError(
                f"`reference` is None and the erased model is a {type(erased).__name__} without an adapter to disable: "
                "pass the model it was erased from."
            )
        if reference is not None:
            sizes = [model.config.get_text_config().vocab_size for model in (reference, erased)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"`reference` has a vocabulary of {sizes[0]} tokens and the erased model one of {sizes[1]}: pass "
                    "the model it was erased from."
                )
        self.erased = erased
        self._reference = reference

    @contextmanager
    def use(self, side: Side) -> Iterator[PreTrainedModel | PeftModel]:
        """The model of a side, in evaluation mode and as it was afterwards; sides must not be nested."""
        if side == "reference" and self._reference is not None:
            with evaluating(self._reference):
                yield self._reference
        elif side == "reference":
            assert isinstance(self.erased, PeftModel)
            with evaluating(self.erased), adapter_disabled(self.erased):
                yield self.erased
        else:
            with evaluating(self.erased):
                yield self.erased

    @property
    def models(self) -> list[PreTrainedModel | PeftModel]:
        """The erased model, and the reference where it is another one."""
        return [self.erased] if self._reference is None else [self.erased, self._reference]

    @property
    def adapter(self) -> PeftModel | None:
        """The erased model where it carries an adapter, else `None`."""
        return self.erased if isinstance(self.erased, PeftModel) else None
