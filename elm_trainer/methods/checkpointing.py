"""The files of a run: its settings, checkpoints that are written whole, and which of them it can resume from."""

import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..files import (
    RUN_FILE,
    UNFINISHED,
    discard,
    first_damage,
    folder_checksums,
    read_object,
    sealed,
    sync,
    unsealed,
    write_json,
)


logger = logging.get_logger(__name__)
# Written last, when every process has written its part. It holds the launch, and the checksums of all files.
FINISHED_FILE = "erasure_checkpoint.json"
_ASIDE = ".former"
# What the Trainer resumes from, where one process holds it all. An adapter with a name of its own is a folder deeper.
_NEEDED = {
    "adapter_model.safetensors": ("*model*.safetensors", "*/adapter_model.safetensors"),
    "trainer_state.json": ("trainer_state.json",),
    "optimizer.pt": ("optimizer.pt",),
    "scheduler.pt": ("scheduler.pt",),
    "rng_state.pth": ("rng_state*.pth",),
}


@dataclass(frozen=True)
class Launch:
    """How a run is spread over devices."""

    # What cuts the weights or the optimizer over the processes: "none" (one process, or DistributedDataParallel), "FSDP1",
    # "FSDP2", "DeepSpeed ZeRO-2", ...
    sharding: str
    processes: int
    rows_per_step: int  # rows of the dataset that all processes together take to a step

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


def begin_run(trainer: Any, resume: str | Path | bool | None, record: Mapping[str, Any]) -> str | None:
    """The checkpoint to resume from (`resume`, or with `True` the last that is whole), after a check of all that a run in this
    folder must keep to. Its settings are written down; all but the `recipe` must be those of the run to be resumed.

    Raises:
        ValueError: if the folder holds another run, or the checkpoint is not whole or of another launch.
    """
    output_dir = Path(trainer.args.output_dir)
    restore_set_aside(output_dir)
    found = checkpoints(output_dir)
    if found and not resume:
        raise ValueError(
            f"`output_dir` is {str(output_dir)!r}, which holds the checkpoints of another run ({found[-1]}): resume it with "
            "`resume_from_checkpoint=True`, or name another folder."
        )
    checkpoint = None
    if resume is True:
        checkpoint = last_whole(found)
        if checkpoint is None:
            logger.warning(
                f"`resume_from_checkpoint` is True, but {output_dir} holds no finished checkpoint: starting afresh."
            )
    elif resume:
        checkpoint = Path(resume)
        check_whole(checkpoint)
    run_file = output_dir / RUN_FILE
    if checkpoint is not None:
        _check_settings(run_file, record)
        check_launch(checkpoint, Launch.of(trainer))
    write_json(run_file, record)
    return None if checkpoint is None else str(checkpoint)


def _check_settings(run_file: Path, record: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a run that is to be resumed has noted other settings than this record's."""
    if not run_file.exists():
        return
    try:
        saved = read_object(run_file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{run_file}, which holds the settings of the run to be resumed, cannot be read ({error}): delete it to "
            "resume without comparing them with those of this run."
        ) from error
    # A run of an earlier version may lack some.
    changed = [key for key in record if key != "recipe" and saved.get(key, record[key]) != record[key]]
    if changed:
        raise ValueError(
            f"`output_dir` {str(run_file.parent)!r} holds a run with other settings ({', '.join(sorted(changed))} changed): "
            "restore them to resume, or name another folder."
        )


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Gives a folder whose files take the place of those in `folder` of the same name once the block has ended.

    What is there already stays as it was until all of the new files are whole.

    Raises:
        OSError: if they could not be written.
    """
    staged = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield staged
        files = [path for path in staged.rglob("*") if path.is_file()]
        for path in files:
            sync(path)
        for path in files:
            place = folder / path.relative_to(staged)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)
        sync(folder)
    except Exception as error:
        raise OSError(
            f"The model could not be saved to {str(folder)!r} ({error}): free some space, or name a folder that can be "
            "written to. Earlier files are as they were."
        ) from error
    finally:
        discard(staged)


@contextmanager
def saving_checkpoint(trainer: Any, folder: Path) -> Iterator[None]:
    """While this holds, the Trainer writes a checkpoint, which is then marked as finished; older ones are deleted only then.

    All processes must enter. What fails leaves no unfinished checkpoint, and raises `OSError`.
    """
    args, limit = trainer.args, trainer.args.save_total_limit
    try:
        if args.should_save and folder.exists():
            # An earlier one of the same step stays until this one is finished.
            os.rename(folder, f"{folder}{_ASIDE}")
        trainer.accelerator.wait_for_everyone()
        args.save_total_limit = None
        yield
        # It is finished when every process has written its part.
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            mark_finished(folder, Launch.of(trainer))
    # Also what the libraries call a full disk: `RuntimeError`, `SafetensorError`, and tokenizers `Exception`.
    except Exception as error:
        if args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            restore_set_aside(folder.parent)
        raise OSError(
            f"`output_dir` {args.output_dir!r}: checkpoint {folder.name} could not be written ({error}): free some space, or "
            "see why another process ended, and resume. The unfinished checkpoint was removed; last good one: "
            f"{last_good(args.output_dir)}."
        ) from error
    finally:
        args.save_total_limit = limit
    if args.should_save:
        restore_set_aside(folder.parent)
        rotate(folder, limit, trainer.state.best_model_checkpoint)


def mark_finished(checkpoint: Path, launch: Launch) -> None:
    """Say that a checkpoint is finished, of which launch it is, and what its files hold, all of which are on the disk then."""
    (checkpoint / FINISHED_FILE).unlink(missing_ok=True)
    files = folder_checksums(checkpoint)
    write_json(checkpoint / FINISHED_FILE, sealed(asdict(launch) | {"files": files}))
    sync(checkpoint.parent)


def read_mark(checkpoint: Path) -> tuple[Launch, dict[str, dict[str, Any]] | None]:
    """The launch of a finished checkpoint, and the checksums of its files (`None` in one of an earlier version).

    Raises `ValueError` if the mark is damaged, and `OSError` if it can't be read.
    """
    names = [field.name for field in fields(Launch)]
    try:
        stored = read_object(checkpoint / FINISHED_FILE)
        content = stored if stored.keys() == set(names) else unsealed(stored)
        if content is None:
            raise ValueError("its own SHA-256 is another")
        return Launch(**{name: content[name] for name in names}), content.get("files")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{FINISHED_FILE} is damaged ({error})") from error


def damage(checkpoint: Path) -> str | None:
    """What keeps a run from resuming from a finished checkpoint: a file, and what is wrong with it. Every byte is read."""
    try:
        launch, files = read_mark(checkpoint)
    except (OSError, ValueError) as error:
        return str(error)
    if files is not None and (reason := first_damage(checkpoint, files)) is not None:
        return reason
    if launch.sharding == "none":
        # FSDP and DeepSpeed have names of their own.
        for name, patterns in _NEEDED.items():
            if not any(path.is_file() for pattern in patterns for path in checkpoint.glob(pattern)):
                return f"{name} is missing"
    return _unreadable(checkpoint) if files is None else None


def _unreadable(checkpoint: Path) -> str | None:
    """What can be seen of damage where there are no checksums."""
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as tensors:
                    tensors.keys()
            elif path.suffix in (".pt", ".pth", ".bin"):
                # PyTorch writes zip files, whose parts have checksums.
                with ZipFile(path) as parts:
                    if (part := parts.testzip()) is not None:
                        raise ValueError(f"its part {part} is damaged")
        except (OSError, ValueError, RuntimeError, EOFError, struct.error, SafetensorError, BadZipFile) as error:
            return f"{path.name} cannot be read ({error})"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder by their step, finished or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _step(path) >= 0]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    """The step of a checkpoint by its name; -1 for anything else."""
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() else -1


def last_good(output_dir: str | Path) -> str:
    """The last finished checkpoint in a folder, as a message names it."""
    found = (str(path) for path in reversed(checkpoints(Path(output_dir))) if (path / FINISHED_FILE).exists())
    return next(found, "none yet")


def last_whole(found: Sequence[Path]) -> Path | None:
    """The last of some checkpoints that is finished and undamaged. A warning names the file that spoiled a later one.

    Raises `ValueError` if some are finished, but all of these are damaged.
    """
    reasons = []
    for path in reversed(found):
        if not (path / FINISHED_FILE).exists():
            logger.warning(f"{path} is left out: the run was stopped while it wrote it.")
        elif (reason := damage(path)) is None:
            return path
        else:
            reasons.append(f"{path}: {reason}")
            logger.warning(f"{path} is left out, since it is damaged: {reason}. An earlier one is looked for.")
    if reasons:
        raise ValueError(
            f"`resume_from_checkpoint` is True, but every finished checkpoint is damaged ({'; '.join(reasons)}): restore one, "
            "or train anew in another `output_dir`."
        )
    return None


def restore_set_aside(output_dir: Path) -> None:
    """Delete what was set aside if the checkpoint in its place is finished, and put it back otherwise."""
    for aside in output_dir.glob(f"checkpoint-*{_ASIDE}"):
        checkpoint = aside.with_suffix("")
        if (checkpoint / FINISHED_FILE).exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
            os.rename(aside, checkpoint)


def rotate(newest: Path, limit: int | None, best: str | Path | None) -> None:
    """Delete the oldest checkpoints by step beside the newest and the best, unfinished ones first, so that `limit` are left.

    Without a limit, or at 0, all are. What has a later step than the newest is of an earlier attempt: it neither counts nor goes.
    """
    if not limit or limit < 0:
        return
    found = [path for path in checkpoints(newest.parent) if _step(path) <= _step(newest)]
    kept = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    older = [path for path in found if path.resolve() not in kept]
    older.sort(key=lambda path: ((path / FINISHED_FILE).exists(), _step(path)))
    for path in older[: max(len(found) - max(limit, len(kept)), 0)]:
        # First of all, so that a half deleted one is not taken for a damaged one.
        (path / FINISHED_FILE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def check_whole(checkpoint: Path) -> None:
    """Raise `ValueError` for a checkpoint that is unfinished or damaged."""
    if not (checkpoint / FINISHED_FILE).exists():
        reason = (
            f"lacks {FINISHED_FILE}: it is not a checkpoint of an erasure, or the run was stopped while it wrote it"
        )
    elif (found := damage(checkpoint)) is not None:
        reason = f"is damaged: {found}"
    else:
        return
    raise ValueError(
        f"`resume_from_checkpoint` is {str(checkpoint)!r}, which {reason}. Resume from an earlier one "
        "(`resume_from_checkpoint=True` finds the last that is whole)."
    )


def check_launch(checkpoint: Path, launch: Launch) -> None:
    """Raise `ValueError` for a whole checkpoint that a run under this launch cannot resume from.

    FSDP and DeepSpeed have file formats of their own, and DeepSpeed's are cut to the number of processes. Otherwise the
    number of processes may change; a warning says what then differs.
    """
    saved, files = read_mark(checkpoint)
    if files is None:
        logger.warning(
            f"{checkpoint} was written by an earlier version, without checksums: not all damage would be seen."
        )
    if saved.sharding != launch.sharding:
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, which was written under sharding {saved.sharding!r}, but "
            f"this run has {launch.sharding!r}, which cannot read its files: launch as before, or train anew in "
            "another `output_dir`. The checkpoint's adapter can be evaluated as it is, but no training can start from it: the "
            "reference is the model without it."
        )
    if saved.processes != launch.processes:
        if launch.sharding.startswith("DeepSpeed"):
            raise ValueError(
                f"`resume_from_checkpoint` is {str(checkpoint)!r}, which {saved.processes} processes wrote; there are "
                f"{launch.processes} now, and DeepSpeed cuts the optimizer by their number: launch with "
                f"`--num_processes {saved.processes}`."
            )
        logger.warning(
            f"{checkpoint} was written by {saved.processes} processes, and {launch.processes} continue: dropout draws "
            "other numbers than it would have."
        )
    if saved.rows_per_step != launch.rows_per_step:
        logger.warning(
            f"{checkpoint} was written at {saved.rows_per_step} rows to a step, and the run continues at "
            f"{launch.rows_per_step}: set `per_device_train_batch_size` and `gradient_accumulation_steps` so that "
            "they are the same, or some rows are seen twice and others not at all."
        )
