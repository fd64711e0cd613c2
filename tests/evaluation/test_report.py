"""Reports are read, identified and compared; damaged and made-up ones are read as they stand, or refused by name."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from elm_trainer import ModelPair, compare_reports, read_report
from elm_trainer.evaluation.report import check_report, dataset_info, model_fingerprint, pair_fingerprint
from elm_trainer.files import write_json
from tests.fuzz import fuzz
from tests.hub.cards import small_report


@pytest.mark.parametrize(
    ("version", "fix"), [(99, "upgrade elm-trainer"), (1, "measure again"), (None, "measure again")]
)
def test_a_report_of_another_schema_is_refused(version, fix, tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema_version": version}))
    with pytest.raises(ValueError, match=rf"old\.json has schema_version {version}, but this version reads 2: {fix}"):
        read_report(path)


def test_a_report_of_another_kind_is_refused(report, tmp_path):
    write_json(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json")["figures"] == report["figures"]
    with pytest.raises(ValueError, match="of the kind 'evaluation', not 'attacks'"):
        read_report(tmp_path / "report.json", "attacks")


def test_a_failed_write_leaves_the_earlier_report(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("earlier")
    with pytest.raises(TypeError):
        write_json(path, {"figures": object()})
    assert path.read_text() == "earlier"


def test_the_fingerprint_is_that_of_the_base_with_and_without_an_adapter(tiny_model):
    bare = model_fingerprint(tiny_model)
    wrapped = get_peft_model(tiny_model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert model_fingerprint(wrapped) == bare == pair_fingerprint(ModelPair(wrapped))["reference_sha256"]


def test_the_fingerprint_tells_other_weights_apart(tiny_model):
    first = model_fingerprint(tiny_model)
    with torch.no_grad():
        tiny_model.model.norm.weight[0] += 1e-3
    second = model_fingerprint(tiny_model)
    assert len({first, second, model_fingerprint(tiny_model.bfloat16())}) == 3


def test_another_adapter_changes_the_fingerprint_of_the_erased_model_alone(tiny_peft_model):
    pair = ModelPair(tiny_peft_model)
    before = pair_fingerprint(pair)
    with torch.no_grad():
        next(p for n, p in tiny_peft_model.named_parameters() if "lora_B" in n).add_(1)
    after = pair_fingerprint(pair)
    assert (
        after["reference_sha256"] == before["reference_sha256"] and after["erased_sha256"] != before["erased_sha256"]
    )


def test_the_hash_tells_other_texts_apart():
    first, second = dataset_info(["a", "b"], "v1"), dataset_info(["ab"], "v1")
    assert first["size"] == 2 and first["revision"] == "v1" and first["sha256"] != second["sha256"]


def test_a_report_compared_with_itself_changes_nothing(report):
    compared = compare_reports(report, report)
    assert compared.keys() == {name for name in report["figures"] if not name.startswith("families.")}
    for name, figure in compared.items():
        assert figure["first"] == figure["second"] == report["figures"][name]["erased"]
        unchanged = 1 if report["figures"][name]["statistic"] == "perplexity" else 0
        assert figure["change"]["value"] == figure["change"]["low"] == unchanged
        assert figure["p"] in (1.0, None)


def test_a_better_erasure_shows(report):
    other = copy.deepcopy(report)
    name = "multiple_choice.capitals.pmi"
    report["items"][name]["erased"]["values"] = [1.0] * 6
    other["items"][name]["erased"]["values"] = [0.0] * 6
    figure = compare_reports(report, other)[name]
    assert figure["change"] == {"value": -1, "low": -1, "high": -1, "n": 6}
    assert figure["p"] <= len(report["figures"]) * 2 * 0.5**6


@pytest.mark.parametrize("field", ["revision", "size", "sha256"])
def test_reports_on_other_questions_refuse_to_be_compared(field, report):
    other = copy.deepcopy(report)
    other["datasets"]["bank capitals"][field] = 7
    with pytest.raises(ValueError, match=rf"ask different things \(bank capitals\).*{field}"):
        compare_reports(report, other)


def test_a_bank_that_one_report_lacks_is_refused(report):
    other = copy.deepcopy(report)
    del other["datasets"]["bank geography"]
    with pytest.raises(ValueError, match="'bank geography' is .* in the first and None in the second"):
        compare_reports(report, other)


def test_reports_on_other_models_are_refused(report):
    with pytest.raises(ValueError, match="different reference models"):
        compare_reports(report, report | {"reference_sha256": "0" * 64})


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
