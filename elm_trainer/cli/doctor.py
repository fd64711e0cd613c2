"""Say in a page what an erasure will do, take and stumble over, before anything heavy runs.

`elm doctor --recipe smollm2-135m-capitals`, or with any other options of `elm erase`; `elm doctor --model MODEL` alone shows
what suits a model. The exit code is 1 where the run would fail.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from . import hush_libraries
from .erase_options import check_folder, erasure_line
from .planned_run import DoctorArguments, PlannedRun, existing


if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80
_MARKS = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "problem": "[red]✗[/]"}


class Finding(NamedTuple):
    """What a check has found: that all is well, something worth knowing, or a problem, at which the run would fail."""

    status: Literal["ok", "note", "problem"]
    text: str  # what is so, in a line
    fix: str = ""  # what to do about it


def check_model(run: PlannedRun) -> Finding:
    """The model is found, and a causal language model."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from ..fitting import shown
    from ..hub.errors import first_line
    from ..modeling import PACKAGED_MODELS
    from ..rehearsal import model_bytes

    name = run.arguments.model
    if run.is_on_hub:
        try:
            validate_repo_id(name)
        except HFValidationError:
            known = ", ".join(PACKAGED_MODELS)
            return Finding("problem", f"{name!r}: no such folder or file, and no Hub id", f"--model FOLDER or {known}")
        try:
            run.loaded  # noqa: B018
        except OSError as error:
            if not run.hub.reachable:
                text = f"{name!r} is neither a folder nor in the cache, and the Hub is not reached ({run.hub.text})"
                return Finding("problem", text, "connect and try again, or --model FOLDER")
            return Finding("problem", f"{name!r}: {first_line(error)}", "check the name, or `hf auth login`")
    model = run.model
    weights = sum(parameter.numel() for parameter in model.parameters())
    text = model.config.get_text_config()
    where = "on the Hub" if run.is_on_hub else "here"
    return Finding(
        "ok",
        f"{type(model).__name__} {where}: {text.num_hidden_layers} layers, hidden size {text.hidden_size}, "
        f"{weights / 1e6:,.1f} M weights in {str(run.dtype).removeprefix('torch.')} ({shown(model_bytes(model))})",
    )


def check_tokenizer(run: PlannedRun) -> Finding:
    """The tokenizer belongs to the model; what it adds to texts."""
    tokenizer = run.tokenizer
    rows = run.model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        text = f"{len(tokenizer)} tokens, but the model has {rows} embeddings"
        return Finding("problem", text, "it is another model's: put the model's own beside it")
    bos, template = tokenizer.bos_token, tokenizer.chat_template
    first = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] if bos else False
    parts = [
        f"{len(tokenizer)} tokens",
        f"{'begins' if first else 'does not begin'} texts with {bos or 'a BOS token'}",
    ]
    parts.append(f"pads with {tokenizer.pad_token}" if tokenizer.pad_token else "no pad token")
    parts.append("chat template" if template else "no chat template")
    notes = []
    if not tokenizer.pad_token:
        notes.append(f"{tokenizer.eos_token or 'its first token'} will pad")
    if not template:
        notes.append("questions are asked as plain text")
    elif bos and isinstance(template, str):
        messages = [{"role": "user", "content": "a"}]
        if first and str(tokenizer.apply_chat_template(messages, tokenize=False)).startswith(str(bos)):
            notes.append(f"the template writes {bos} too, and texts get it once")
    return Finding("note" if notes else "ok", ", ".join(parts), "; ".join(notes))


def check_adapter(run: PlannedRun) -> Finding:
    """The adapter matches modules, in layers that exist."""
    from peft.tuners.lora import LoraLayer

    from ..methods.validation import check_adapter as check

    check(run.model, run.lora)
    count = run.model_config.get_text_config().num_hidden_layers
    names = [name for name, module in run.adapted.named_modules() if isinstance(module, LoraLayer)]
    trained = sum(
        parameter.numel()
        for name, parameter in run.adapted.named_parameters()
        if parameter.requires_grad and not (run.config.contrast_rows and "lora_A" in name)
    )
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    layers = run.arguments.lora_layers or f"0-{count - 1}"
    return Finding(
        "ok",
        f"{len(names)} modules ({kinds}) in layers {layers} of 0-{count - 1}; {trained / 1e6:.2f} M trained weights",
    )


def check_settings(run: PlannedRun) -> Finding:
    """Options that an erasure cannot follow."""
    from ..methods.config import check_options

    if run.unchosen is not None:
        raise run.unchosen
    check_options(run.config, {})
    config = run.config
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    return Finding("ok", f"{', '.join(run.concepts)}: {steps} of {rows} rows, seed {config.seed}")


def check_texts(run: PlannedRun) -> Finding:
    """Every source of texts is there; how many rows it has."""
    from ..data.sources import is_asked_of_the_hub

    if run.made is None:
        forget = run.arguments.forget
        named = [*forget, *run.arguments.retain]
    else:
        forget, what = ["forget"], run.made.made_from
        named = [str(source) for source in (*what.documents, *what.near, *what.retain)]
    far = [name for name in dict.fromkeys(named) if is_asked_of_the_hub(name)]
    if far and not run.hub.reachable:
        return Finding("problem", f"{', '.join(far)}: the Hub is not reached ({run.hub.text})", "name a file here")
    counts = {name: len(texts) for name, texts in run.texts.items()}
    rows = run.dataset
    left = sum(counts[name] for name in forget) - len(rows)
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    text = f"{len(rows):,} rows of {told}"
    pairs = sum(map(bool, rows["completion"]))
    if run.config.consistency_weight and not pairs and not run.arguments.synthetic_size:
        return Finding("note", text, "no synthetic pairs, so there is no consistency term (`synthetic`)")
    if run.made is not None and run.planned.note:
        return Finding("note", text, run.planned.note)
    if left > 0:
        return Finding("note", text, f"{left:,} forget texts are left out: raise `dataset_size` to use all")
    return Finding("ok", text)


def check_questions(run: PlannedRun) -> Finding:
    """There are questions that can tell whether the concept is gone."""
    asked = run.arguments.asked(run.concepts) if run.arguments.evaluate else None
    if asked is None:
        return Finding("note", "nothing is measured (`evaluate` is false)", "`elm evaluate` can do it afterwards")
    suite, measures = asked
    count = sum(map(len, suite.banks.values()))
    text = f"{count:,} questions of {len(suite.banks)} banks; {', '.join(measures)}"
    if missing := [name for name in run.concepts if not suite.banks.get(name)]:
        return Finding("note", text, f"none about {', '.join(missing)}: give a `bank`, or nobody knows if it is gone")
    return Finding("ok", text)


def check_device(run: PlannedRun) -> Finding:
    """Where the model is trained, and whether it multiplies as asked."""
    import torch

    from ..distributed import multiplies_in_bfloat16
    from ..fitting import shown

    device, fast = run.device, multiplies_in_bfloat16(run.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    multiplies = "multiplies" if fast else "does not multiply"
    text = f"{device.type} ({name}), {shown(run.free)} free, {multiplies} in bfloat16"
    if run.config.bf16 and not fast:
        return Finding("note", text, "bf16 saves memory here and no time: `bf16: false`")
    if fast and not run.config.bf16 and str(run.dtype) == "torch.float32":
        return Finding("note", text, "`bf16: true` would take less time")
    return Finding("ok", text)


def check_memory(run: PlannedRun) -> Finding:
    """What the run holds at its peak fits."""
    from ..fitting import shown
    from ..rehearsal import Cut, adapter_bytes, model_bytes

    free, config = run.free, run.config
    least = model_bytes(run.model) + adapter_bytes(run.adapted, bool(config.contrast_rows))
    if least > free:
        text = f"weights, adapter and optimizer alone take {shown(least)}, and {shown(free)} are free"
        return Finding("problem", text, "`dtype: bfloat16`, a smaller model, or more devices (docs/scale.md)")
    layers = run.model_config.get_text_config().num_hidden_layers
    cut = Cut.of(layers, run.lora.layers_to_transform)
    if model_bytes(run.model) * len(cut.chosen) / layers > free / 2:
        return Finding("note", f"more than {shown(least)} of {shown(free)}; too large to be rehearsed here", "")
    found = run.prediction
    rows = config.per_device_train_batch_size
    text = (
        f"{shown(found.peak)} at the peak of training, {shown(free)} free: weights {shown(found.weights)}, adapter and optimizer "
        f"{shown(found.adapter)}, activations {shown(found.activations)} ({rows} rows, {found.tokens} tokens), logits "
        f"{shown(found.logits)}, libraries and buffers {shown(found.rest)}"
    )
    if found.peak > free:
        room = free - (found.peak - found.activations)
        fewer = int(rows * room / max(found.activations, 1)) if room > 0 else 0
        fix = f"`per_device_train_batch_size: {fewer}` with as much more accumulation" if fewer else "a smaller model"
        return Finding("problem", text, f"{fix}; `activation_checkpointing: true`; `dtype: bfloat16`")
    return Finding("note" if found.peak > 0.9 * free else "ok", text)


def check_time(run: PlannedRun) -> Finding:
    """How long the run takes."""
    if "prediction" not in vars(run):
        return Finding("note", "not known: nothing was rehearsed", "see memory")
    found = run.prediction
    parts = [f"targets {duration(found.targets_seconds)}"] if found.targets_seconds else []
    parts += [f"directions {duration(found.contrast_seconds)}"] if found.contrast_seconds else []
    parts.append(f"{found.steps} steps of {found.step_seconds:.2f} s")
    return Finding(
        "ok",
        f"about {duration(found.seconds)}: {', '.join(parts)}; loading and evaluation come on top. Measured on "
        f"{found.measured}",
    )


def check_disk(run: PlannedRun) -> Finding:
    """Targets, adapter and checkpoints fit on their disks."""
    from ..fitting import shown

    if "prediction" not in vars(run):
        return Finding("note", "not known: nothing was rehearsed", "see memory")
    found, config = run.prediction, run.config
    output = existing(Path(config.output_dir))
    saved = 0
    if str(config.save_strategy).rpartition(".")[2].lower() != "no":
        saved = config.save_total_limit or max(found.steps // max(int(config.save_steps), 1), 1)
    # An adapter in float32 is a quarter of itself with gradient and moments; a checkpoint has the moments too.
    needed = found.adapter // 4 + saved * found.adapter * 3 // 4
    text = f"{shown(found.targets_disk)} of targets in {run.targets_dir}, {shown(needed)} in {config.output_dir}"
    for folder, bytes_ in ((existing(run.targets_dir), found.targets_disk), (output, needed)):
        if (free := shutil.disk_usage(folder).free) < bytes_:
            return Finding(
                "problem", f"{text}, but {folder} has {shown(free)} free", "free some, or name another folder"
            )
    return Finding("ok", f"{text}; {shown(shutil.disk_usage(output).free)} free")


def check_output(run: PlannedRun) -> Finding:
    """`output_dir` can be written to, and no run is in it."""
    from ..run_lock import LOCK_FILE, FolderInUseError, only_run_in

    folder = Path(run.config.output_dir)
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            pass
        if (folder / LOCK_FILE).exists():
            with only_run_in(folder):
                pass
    except FolderInUseError as error:
        return Finding("problem", str(error), "wait for it, or `--output_dir` another")
    except OSError as error:
        return Finding("problem", f"{folder} cannot be written to ({error.strerror})", "`--output_dir` another")
    if not folder.exists() or not any(folder.iterdir()):
        return Finding("ok", f"{folder} is new")
    if run.arguments.checkpoint(run.config):
        return Finding("ok", f"{folder} holds files of an earlier run, which goes on")
    if run.arguments.overwrite:
        return Finding("note", f"{folder} holds files of an earlier run", "they are removed (`overwrite`)")
    if [*folder.glob("checkpoint-*")]:
        return Finding("problem", f"{folder} holds checkpoints of another run", "`resume` or `overwrite`")
    if run.made is not None:
        check_folder(folder)
    return Finding("note", f"{folder} holds files of an earlier run", "those of the same name are replaced")


def check_hub(run: PlannedRun) -> Finding:
    """The Hub answers, where it is needed."""
    hub, config = run.hub, run.config
    text = f"{hub.text}, {'a token is there' if hub.token else 'no token'}"
    if config.push_to_hub and not hub.token and not config.hub_token:
        return Finding("problem", f"{text}, and `push_to_hub` needs one", "`hf auth login`, or set HF_TOKEN")
    if config.push_to_hub and not hub.reachable:
        return Finding("problem", f"{text}, and `push_to_hub` needs it", "leave it out, and `elm publish` later")
    return Finding("ok", text) if hub.reachable else Finding("note", text, "nothing here needs it")


class Check(NamedTuple):
    """A line of the page: what it is about, the function that looks, and the lines that must be sound before."""

    name: str
    look: Callable[[PlannedRun], Finding]
    needs: Sequence[str] = ()


_RUN = ("model", "tokenizer", "adapter", "settings", "texts")
CHECKS = (
    Check("model", check_model),
    Check("tokenizer", check_tokenizer, ["model"]),
    Check("adapter", check_adapter, ["model"]),
    Check("settings", check_settings),
    Check("texts", check_texts, ["tokenizer"]),
    Check("questions", check_questions),
    Check("device", check_device, ["model"]),
    Check("memory", check_memory, _RUN),
    Check("time", check_time, _RUN),
    Check("disk", check_disk, _RUN),
    Check("output_dir", check_output),
    Check("Hub", check_hub),
)


def examine(run: PlannedRun, checks: Sequence[Check] = CHECKS) -> dict[str, Finding]:
    """What each check finds. One that fails itself is a finding, too; one whose needs are not met is left out with a note."""
    from ..hub.errors import first_line

    found: dict[str, Finding] = {}
    for name, look, needs in checks:
        unmet = [
            other for other in needs if other in found and (found[other].status == "problem" or not found[other].text)
        ]
        if unmet:
            found[name] = Finding("note", "", f"looked at once {unmet[0]} is sound")
            continue
        try:
            found[name] = look(run)
        except (ValueError, OSError) as error:  # our own say what to do
            found[name] = Finding("problem", " ".join(str(error).split()))
        except Exception as error:
            found[name] = Finding("problem", f"could not be looked at ({first_line(error)})")
    return found


def duration(seconds: float) -> str:
    """Seconds as people read them, such as `"4 min"`."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def show(run: PlannedRun, found: dict[str, Finding], console: "Console") -> None:
    """Print the page."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for name, (status, text, fix) in found.items():
        lines = [escape(text)] * bool(text) + [f"[dim]→ {escape(fix)}[/]"] * bool(fix)
        table.add_row(_MARKS[status], name, "\n".join(lines))
    console.print(table)
    if run.made is not None:
        run.made.show(console)
    elif found["model"].status != "problem":
        from ..fitting import fitting_settings

        fitted = Table("setting", "here", "suits", "because", box=None, padding=(0, 1, 0, 0), header_style="bold")
        choices = fitting_settings(run.model, memory=run.free, device=run.device).choices
        for name, (value, reason) in choices.items():
            here = getattr(run.arguments, name, getattr(run.config, name, None))
            fitted.add_row(name, str(here), str(value), escape(reason))
        console.print(fitted)
    problems = [name for name, finding in found.items() if finding.status == "problem"]
    end = f"[red]The run would fail: {', '.join(problems)}.[/]" if problems else "[green]Nothing is in the way.[/]"
    console.print(end)


def main(argv: list[str] | None = None) -> None:
    line = erasure_line("doctor", argv, __doc__, DoctorArguments)
    arguments, _ = line.early()
    arguments.check_given(line.given)
    hush_libraries()
    from rich.console import Console
    from transformers.utils import logging

    logging.set_verbosity_error()
    run = PlannedRun.of(line)
    found = examine(run)
    console = Console(width=min(WIDTH, int(os.environ.get("COLUMNS", WIDTH))))
    show(run, found, console)
    if any(finding.status == "problem" for finding in found.values()):
        sys.exit(1)
