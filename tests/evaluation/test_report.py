import json

import pytest
import torch

from elm_trainer import ModelPair, read_report
from elm_trainer.evaluation.report import dataset_info, model_fingerprint, pair_fingerprint
from elm_trainer.files import write_json


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
    from peft import LoraConfig, get_peft_model

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
