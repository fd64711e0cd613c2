"""`compare_methods`: run what is not finished yet, and make the report of it."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from tqdm.auto import tqdm

from ...files import discard_unfinished, write_json
from ...run_lock import only_run_in
from .config import ComparisonConfig
from .method_run import MethodRun, seconds_of
from .reference import measure_reference
from .report import make_report
from .runs import MissingRunError, Runs


Result = TypeVar("Result")


def compare_methods(config: ComparisonConfig) -> dict[str, Any]:
    """Compare erasure methods on the same data, with the same budgets and the same search.

    Each method is trained in every setting of its grid and measured on the dev split; the best setting by one rule is
    trained again with every seed, and measured on the test split: after so many updates, and after so many seconds. What
    is finished lies in `output_dir/runs`; a stopped comparison goes on with what is not.

    Args:
        config ([`ComparisonConfig`]): Settings.

    Raises:
        FolderInUseError: if another run writes to `output_dir`.

    Returns:
        `dict`: the report, which is also written to `output_dir/report.json`. `tables` holds, for the budgets
        `"updates"` and `"seconds"`, each method's `figures`, `verdict` and `score`; `methods` its settings, search and
        costs; `claims` what the seed paper says of them; `beaten` where a rival is better than ELM; `attacks` what comes
        back under attack.
    """
    with only_run_in(config.output_dir):
        folder = Path(config.output_dir) / "runs"
        discard_unfinished(folder)
        reference = _apart(measure_reference, config, Runs(folder))
        results: dict[str, dict[str, Any]] = {}
        seconds = None
        # The one that sets the time goes first.
        for method in tqdm([config.clock, *(name for name in config.methods if name != config.clock)], desc="Methods"):
            try:
                results[method] = MethodRun(config, method, Runs(folder, only_read=True), reference, seconds).run()
            except MissingRunError:
                results[method] = _apart(MethodRun(config, method, Runs(folder), reference, seconds).run)
            if method == config.clock:
                seconds = seconds_of(results[method])
        report = make_report(config, reference, {name: results[name] for name in config.methods}, seconds)
        write_json(Path(config.output_dir) / "report.json", report)
        return report


def _apart(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in a process of its own: its peak of memory is its own, and all of it is freed."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        return pool.submit(function, *args).result()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: what was killed must not train on beside its successor."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()
