"""The subcommands of `elm`."""

import logging
import os
import warnings


def hush_libraries() -> None:
    """Silence the warnings that libraries give in every run and nobody can act on; call it before they are imported."""
    # It looks for kernels on the Hub, for products with four-bit weights; the built-in ones serve as well.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
    # PEFT asks for it by its older name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # A model of a package has no config file beside it, and PEFT need not look whether its vocabulary has grown.
    warnings.filterwarnings("ignore", message="Could not find a config file in", category=UserWarning)
    import torch

    if not torch.accelerator.is_available():
        # The default asks for memory that only a device would read faster.
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
        # Otherwise DeepSpeed prints which accelerator it has found.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
