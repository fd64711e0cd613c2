"""Damaged and made-up reports are read as they stand, or refused by name."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_trainer import compare_reports, read_report
from elm_trainer.evaluation.report import check_report
from tests.fuzz import fuzz
from tests.hub.cards import small_report


SCORES = {"values": [0.0, 1.0, 1.0], "counts": [1, 1, 1]}
REPORT = small_report()
REPORT["items"] = {
    name: {side: copy.deepcopy(SCORES) for side in ("reference", "erased")}
    for name in REPORT["figures"]
    if REPORT["figures"][name]["statistic"] == "mean"
}
CONTENT = json.dumps(REPORT).encode()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def read(path):
    """The report in a file, compared with the sound one; `None` if it was refused."""
    try:
        report = read_report(path)
        compare_reports(REPORT, report)
        compare_reports(report, report)
    except (ValueError, OSError) as error:
        assert "report" in str(error).lower()
        return None
    return report


def test_the_sound_one_is_compared(tmp_path):
    (tmp_path / "report.json").write_bytes(CONTENT)
    assert read(tmp_path / "report.json") == REPORT
    assert compare_reports(REPORT, REPORT).keys() == REPORT["items"].keys() != set()


@fuzz(60)
@given(data=st.data())
def test_no_damage_to_the_bytes_makes_another_error(data, tmp_path_factory):
    content = bytearray(CONTENT)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = min(start + data.draw(st.sampled_from([0, 1, 1, 4, 300])), len(content))
        content[start:end] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"\n", b"\0" * 64, b'"', b"}{", b"[" * 9999, b"null", b"1e999"])
        )
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(bytes(content))
    read(path)


@fuzz(60)
@given(data=st.data())
def test_no_value_in_any_place_makes_another_error(data, tmp_path_factory):
    report = copy.deepcopy(REPORT)
    for _ in range(data.draw(st.integers(1, 3))):
        place, above, key = report, None, None
        while isinstance(place, (dict, list)) and place and (above is None or data.draw(st.integers(0, 3))):
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            above, place = place, place[key]
        if above is not None:
            above[key] = data.draw(JSON)
    path = tmp_path_factory.getbasetemp() / "changed.json"
    path.write_text(json.dumps(report), encoding="utf-8", errors="replace")
    read(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("figures", None), ("figures", [1]), ("figures", {"a": 1}), ("items", {"a": []}), ("datasets", "x"), ("roles", {"a": 1}),
        ("samples", {"a": {}}), ("samples", ["x"]), ("reference_sha256", 1), ("erased_sha256", None),
    ],
)  # fmt: skip
def test_a_part_of_another_form_is_named(key, value):
    with pytest.raises(ValueError, match=f"The report has a `{key}` of another form"):
        check_report(REPORT | {key: value})
