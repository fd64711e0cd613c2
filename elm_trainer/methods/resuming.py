"""What a checkpoint must be so that a run can go on from it: finished, and of files that the launch can read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)
# Written last, when every process has written its part. It says under what launch.
FINISHED_FILE = "erasure_checkpoint.json"


@dataclass(frozen=True)
class Launch:
    """How a run is spread over devices.

    Attributes:
        sharding (`str`): What cuts the weights or the optimizer over the processes: `"none"` (one process, or
            DistributedDataParallel), `"FSDP1"`, `"FSDP2"`, `"DeepSpeed ZeRO-2"`, ...
        processes (`int`): Number of processes.
        rows_per_step (`int`): Rows of the dataset that all of them together take to a step.
    """

    sharding: str
    processes: int
    rows_per_step: int

    @classmethod
    def of(cls, trainer: Any) -> "Launch":
        """The launch that a [`~transformers.Trainer`] is in."""
        state, args = trainer.accelerator.state, trainer.args
        sharding = "none"
        if trainer.is_deepspeed_enabled:
            sharding = f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}"
        elif trainer.is_fsdp_enabled:
            sharding = f"FSDP{state.fsdp_plugin.fsdp_version}"
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return cls(sharding, args.world_size, rows)


def mark_finished(checkpoint: Path, launch: Launch) -> None:
    """Say that a checkpoint is finished, and of which launch it is."""
    (checkpoint / FINISHED_FILE).write_text(json.dumps(asdict(launch), indent=2), encoding="utf-8")


def unmark(checkpoint: Path) -> None:
    """Take that back, before the files are written anew."""
    (checkpoint / FINISHED_FILE).unlink(missing_ok=True)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder by their step, finished or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    found = [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_finished(found: Sequence[Path]) -> Path | None:
    """The last finished one of some checkpoints: a run that is killed while it saves leaves one that is not."""
    return next((path for path in reversed(found) if (path / FINISHED_FILE).exists()), None)


def check_launch(checkpoint: str | Path, launch: Launch) -> None:
    """Raise `ValueError` for a checkpoint that a run under this launch cannot go on from.

    FSDP and DeepSpeed have file formats of their own, and DeepSpeed's are cut to the number of processes. Otherwise the
    number of processes may change; a warning says what then differs.

    Args:
        checkpoint (`str` or `Path`): Folder of the checkpoint.
        launch ([`Launch`]): The launch that is to go on from it.
    """
    path = Path(checkpoint) / FINISHED_FILE
    if not path.exists():
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, which lacks {FINISHED_FILE}: it is no checkpoint of an "
            "erasure, or the run was stopped while it wrote it. Resume from an earlier one "
            "(`resume_from_checkpoint=True` finds the last that is finished)."
        )
    stored = json.loads(path.read_text(encoding="utf-8"))
    saved = Launch(**{field.name: stored[field.name] for field in fields(Launch)})
    if saved.sharding != launch.sharding:
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, which was written under sharding {saved.sharding!r}, but "
            f"this run has {launch.sharding!r}, which cannot read its files: launch as before, or begin a new run, in "
            "another `output_dir`, with its adapter (`PeftModel.from_pretrained(model, checkpoint, is_trainable=True)`)."
        )
    if saved.processes != launch.processes:
        if launch.sharding.startswith("DeepSpeed"):
            raise ValueError(
                f"`resume_from_checkpoint` is {str(checkpoint)!r}, which {saved.processes} processes wrote; there are "
                f"{launch.processes} now, and DeepSpeed cuts the optimizer by their number: launch with "
                f"`--num_processes {saved.processes}`."
            )
        logger.warning(
            f"{checkpoint} was written by {saved.processes} processes, and {launch.processes} go on: dropout draws "
            "other numbers than it would have."
        )
    if saved.rows_per_step != launch.rows_per_step:
        logger.warning(
            f"{checkpoint} was written at {saved.rows_per_step} rows to a step, and the run goes on at "
            f"{launch.rows_per_step}: set `per_device_train_batch_size` and `gradient_accumulation_steps` so that "
            "they are the same, or some rows are seen twice and others not at all."
        )
