"""FSDP and DeepSpeed without an accelerator."""

import os
from importlib import import_module

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow() -> None:
    """From now on in this process, shards of either kind are spread over several CPU processes, by gloo alone.

    Accelerate turns FSDP on for GPUs and their like alone, though PyTorch can. DeepSpeed compiles an operator for processes of one
    machine that share memory, a minute or two on both cores, and does the same without it.
    """
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        backend = import_module("deepspeed.comm.torch")
        assert callable(backend.build_shm_op)  # no part of DeepSpeed's documented API
        backend.build_shm_op = lambda: None
