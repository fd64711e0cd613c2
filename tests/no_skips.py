"""In continuous integration (where `CI` is set) a skipped test is a failed one, unless a marker says that it may be skipped:
`gpu`, `gemma` for the weights that come under terms of their own, or `chat` for the page's extra and a browser.
"""

import os

import pytest


MAY_BE_SKIPPED = ("gpu", "gemma", "chat")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if not any(item.get_closest_marker(marker) for marker in MAY_BE_SKIPPED):
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report):
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):  # the mark of an expected failure
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = (
            f"{reason}: no test is skipped in CI but those marked {' or '.join(MAY_BE_SKIPPED)}. Install it."
        )
