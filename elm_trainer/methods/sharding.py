"""Models that lie in shards: can the adapter be saved, what is saved of it, and how a part is read by itself."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import maybe_gather_lm_head_ctx


def check_saving(trainer: Any) -> None:
    """Raise `ValueError` where the launch would save no adapter.

    Args:
        trainer ([`~transformers.Trainer`]): Trainer, whose accelerator knows the launch.
    """
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled and "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
        raise ValueError(
            f"`fsdp_state_dict_type` is {state.fsdp_plugin.state_dict_type.name}, under which no adapter is saved: set "
            "FULL_STATE_DICT, as in recipes/accelerate/fsdp2.yaml. An adapter is small."
        )
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        settings = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not settings.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "`zero3_save_16bit_model` (`stage3_gather_16bit_weights_on_model_save`) is off, without which ZeRO-3 "
                "saves no adapter: set it to true, as in recipes/accelerate/zero3.yaml."
            )


def align_checkpointing(trainer: Any) -> None:
    """Let gradient checkpointing be of the kind that ZeRO-3 can run with an adapter.

    TRL asks for the reentrant kind under the older of two names, `gradient_checkpointing_kwargs`, which transformers copies
    before and reads no more afterwards.
    """
    args = trainer.args
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole trained weights of a model under FSDP, by name, on the CPU of the first process.

    All processes must call it. Frozen weights are not gathered.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def gathered(module: nn.Module) -> AbstractContextManager:
    """While this holds, ZeRO-3 has the module's frozen weights whole, though the module is not called; all processes enter.

    After a forward, FSDP2 still has those of the head, with which the backward begins.

    Raises:
        ValueError: if the module is trained: its weights would be needed in the backward too.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"`peft_config` trains the {type(module).__name__} that is read for every layer, which ZeRO-3 has in shards: "
            "leave it out of `target_modules` and `modules_to_save`, or use ZeRO-2."
        )
    # Not what is whole already, as weights that the embeddings share: it would be cut up at the end.
    return maybe_gather_lm_head_ctx(*module.parameters())
