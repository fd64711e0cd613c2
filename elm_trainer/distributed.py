"""The processes of a launch and the device of each, what the first of them does for all, and models whose weights lie in shards."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import maybe_gather_lm_head_ctx


Result = TypeVar("Result")
_CGROUP = Path("/sys/fs/cgroup")


def processes_and_rank() -> tuple[int, int]:
    """Number of processes of the launch, and which of them this is; 1 and 0 without a launch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


def from_first(value: Result) -> Result:
    """The value that the first process gave. All processes must call this; without a launch it is the value itself."""
    if processes_and_rank()[0] == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def on_first(work: Callable[[], Result]) -> Result:
    """What the first process makes, in all of them; what it raises is raised in all, so that nobody waits for it.

    All processes must call this.
    """
    made: Any = None
    failure: Exception | None = None
    if processes_and_rank()[1] == 0:
        try:
            made = work()
        except Exception as error:
            failure = error
    made, failure = from_first((made, failure))
    if failure is not None:
        raise failure
    return made


def check_saving(trainer: Any) -> None:
    """Raise `ValueError` where the launch of a [`~transformers.Trainer`] would save no adapter."""
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

    TRL asks for the reentrant kind under the older of two names, `gradient_checkpointing_kwargs`, which transformers has
    copied by then.
    """
    args = trainer.args
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole trained weights of a model under FSDP, by name, on the CPU of the first process. All must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def gathered(module: nn.Module) -> AbstractContextManager:
    """While this holds, ZeRO-3 has the module's frozen weights whole, though the module is not called; all processes enter.

    After a forward, FSDP2 still has those of the head, with which the backward begins. Raises `ValueError` if the module
    is trained, since the backward would need its weights too.
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


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has matrix products in bfloat16, not only the type."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Torch has no public name for these; tests/test_fitting.py fails when they move.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def free_memory(device: torch.device) -> int:
    """Free bytes of an accelerator, or what a new process may take of the main memory, within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = (_CGROUP / f"memory.{name}" for name in ("max", "current"))
        kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Pages of files are given up when memory is needed.
        free = min(free, int(limit.read_text()) - int(used.read_text()) + int(kept["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        pass
    return max(free, 0)
