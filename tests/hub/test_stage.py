import copy
import hashlib
import json
import resource
import shutil

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load, save_file
from transformers import AutoTokenizer

from elm_trainer.data.facts import load_bank
from elm_trainer.evaluation.inside import look_inside
from elm_trainer.evaluation.pair import ModelPair
from elm_trainer.evaluation.report import adapter_fingerprint, pair_fingerprint
from elm_trainer.hub.errors import UnsafeAdapterError
from elm_trainer.hub.info import PUBLISHED_FILES, ErasureInfo
from elm_trainer.hub.published_report import published_report
from elm_trainer.hub.stage import method_of, stage_adapter, tokenizer_changed

from .reports import BASE, PROBES


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(local, tmp_path):
    """A copy of the adapter's folder that a test may change."""
    shutil.copyfile(local.adapter.parent / "erasure_run.json", tmp_path / "erasure_run.json")
    return shutil.copytree(local.adapter, tmp_path / "adapter")


@pytest.fixture
def stage(local, adapter, tokenizer, tmp_path):
    def run(name="staged", adapter=adapter, report=local.report, attacks=None, method=None, **settings):
        method = method or method_of(adapter)
        report = published_report(report, base_model=BASE, method=method, attacks=attacks)
        return stage_adapter(adapter, report, output_dir=tmp_path / name, **{"base_tokenizer": tokenizer} | settings)

    return run


def read_weights(path):
    # Not mapped into memory, so that a test may overwrite the file.
    return load(path.read_bytes())


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_holds_the_evidence_and_nothing_else(stage, local):
    folder = stage(attacks=local.attacks, verification=PROBES)
    assert set(contents(folder)) == {
        "adapter_config.json", WEIGHTS, "erasure.json", "report.json", "report.png", "attacks.png"
    }  # fmt: skip
    assert set(contents(folder)) <= PUBLISHED_FILES
    report = json.loads((folder / "report.json").read_text())
    assert report == json.loads(
        json.dumps(published_report(local.report, base_model=BASE, method="ElmTrainer", attacks=local.attacks))
    )


def test_the_info_names_base_recipe_seed_and_the_hash_of_every_file(stage, local):
    folder = stage(attacks=local.attacks, verification=PROBES)
    info = ErasureInfo.read(folder)
    assert info.concepts == ["capitals"] and info.method == "ElmTrainer" and info.base_model == BASE
    assert info.recipe["model"] == "org/tiny-base" and info.seed == 7 and info.verification == PROBES
    assert info.versions == local.report["versions"]
    assert info.files == {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents(folder).items()
        if name != "erasure.json"
    }


def test_peft_gives_the_same_logits_from_the_folder(stage, local):
    folder = stage()
    ids = torch.tensor([[5, 9, 200, 31]])
    with torch.no_grad():
        expected = local.model(ids).logits
        base = copy.deepcopy(local.model).unload()
        plain = base(ids).logits
        assert torch.equal(PeftModel.from_pretrained(base, folder)(ids).logits, expected)
    assert not torch.equal(plain, expected)
    config = PeftConfig.from_pretrained(folder)
    assert config.base_model_name_or_path == BASE.id and config.revision == BASE.revision and config.inference_mode


def test_the_same_adapter_gives_the_same_bytes(stage, local, adapter):
    first = contents(stage("first", attacks=local.attacks, verification=PROBES))
    # What another run of the same training may write otherwise: order, and words in the weights' header.
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"][::-1]
    (adapter / "adapter_config.json").write_text(json.dumps(dict(reversed(config.items()))))
    tensors = read_weights(adapter / WEIGHTS)
    save_file(dict(reversed(tensors.items())), adapter / WEIGHTS, metadata={"made_by": "jdoe", "format": "pt"})
    assert contents(stage("second", attacks=local.attacks, verification=PROBES)) == first


def test_the_weights_keep_their_values_and_lose_foreign_words(stage, adapter):
    tensors = read_weights(adapter / WEIGHTS)
    save_file(tensors, adapter / WEIGHTS, metadata={"made_by": "jdoe", "format": "pt"})
    folder = stage()
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    staged = read_weights(folder / WEIGHTS)
    assert staged.keys() == tensors.keys() and all(torch.equal(staged[name], tensors[name]) for name in tensors)


def test_the_adapters_folder_is_only_read(stage, adapter):
    before = contents(adapter), {path: path.stat().st_mtime_ns for path in adapter.rglob("*")}
    stage()
    assert (contents(adapter), {path: path.stat().st_mtime_ns for path in adapter.rglob("*")}) == before


def test_the_reports_hash_is_that_of_the_file(local):
    assert adapter_fingerprint(read_weights(local.adapter / WEIGHTS)) == local.report["erased_sha256"]


def test_a_report_on_another_adapter_is_refused(stage, adapter, tmp_path):
    tensors = read_weights(adapter / WEIGHTS)
    tensors[next(iter(tensors))][0, 0] += 1
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ValueError, match="`report` is on another model than `adapter`: `erased_sha256` is"):
        stage()
    assert not (tmp_path / "staged").exists()


def test_foreign_tensors_are_refused_by_name(stage, adapter):
    tensors = read_weights(adapter / WEIGHTS) | {"private.notes": torch.zeros(2)}
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ValueError, match=r"1 tensors without 'lora_', such as private\.notes"):
        stage()


def test_an_adapter_in_half_precision_was_measured_as_peft_loads_it(stage, local, adapter):
    half = {name: tensor.bfloat16() for name, tensor in read_weights(adapter / WEIGHTS).items()}
    save_file(half, adapter / WEIGHTS)
    loaded = PeftModel.from_pretrained(copy.deepcopy(local.model).unload(), adapter)
    folder = stage(report=local.report | pair_fingerprint(ModelPair(loaded)))
    assert read_weights(folder / WEIGHTS).keys() == half.keys()
    assert {tensor.dtype for tensor in read_weights(folder / WEIGHTS).values()} == {torch.bfloat16}


def test_a_look_inside_gives_a_picture(stage, local, tokenizer):
    questions = load_bank("capitals", split="test")[::20]
    texts = ["Rain fell all night on the tin roof.", "She tuned the old piano before the guests came."]
    inside = look_inside(ModelPair(local.model), tokenizer, questions, texts, texts)
    folder = stage(report=local.report | {"inside": inside})
    assert (folder / "inside.png").read_bytes().startswith(b"\x89PNG") and "inside.png" in ErasureInfo.read(
        folder
    ).files


def test_weights_in_a_pickle_are_refused(stage, adapter):
    torch.save(read_weights(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    with pytest.raises(UnsafeAdapterError, match="has no adapter_model.safetensors, and weights in a pickle can run"):
        stage()


def test_weights_that_are_no_safetensors_are_refused(stage, adapter):
    torch.save(read_weights(adapter / WEIGHTS), adapter / WEIGHTS)
    with pytest.raises(UnsafeAdapterError, match="is not a safetensors file"):
        stage()


def test_what_load_erased_would_refuse_is_not_staged(stage, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"layer_replication": [[0, 1], [0, 1]]}))
    with pytest.raises(UnsafeAdapterError, match="`layer_replication` is"):
        stage()


def test_an_adapter_without_a_task_names_no_library_to_import(stage, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"task_type": None, "auto_mapping": mapping}))
    staged = json.loads((stage() / "adapter_config.json").read_text())
    assert staged["auto_mapping"] is None and staged["task_type"] == "CAUSAL_LM"


def test_a_folder_of_checkpoints_is_refused_and_they_are_named(stage, adapter, tmp_path):
    for step in (8, 16):
        shutil.copytree(adapter, tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="these folders in it do: checkpoint-16, checkpoint-8; name one of them"):
        stage(adapter=tmp_path / "run")
    with pytest.raises(ValueError, match="has no adapter_config.json: name an adapter's folder"):
        stage(adapter=tmp_path / "nowhere")


def test_a_folder_of_several_adapters_is_refused(stage, local, tmp_path):
    model = copy.deepcopy(local.model)
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match=r"further adapters beside its own \(second\)"):
        stage(adapter=tmp_path / "both", method="ElmTrainer")


def test_checkpoints_beside_the_adapter_stay_out(stage, adapter):
    shutil.copytree(adapter, adapter / "checkpoint-8")
    assert set(contents(stage())) == {"adapter_config.json", WEIGHTS, "erasure.json", "report.json", "report.png"}


def test_the_method_is_read_beside_the_adapter_or_named(stage, adapter, tmp_path):
    (tmp_path / "erasure_run.json").unlink()
    with pytest.raises(ValueError, match="`method` is None, and neither"):
        stage()
    assert ErasureInfo.read(stage(method="OtherTrainer")).method == "OtherTrainer"


def test_the_bases_own_tokenizer_stays_out_and_a_changed_one_goes_up(stage, adapter, tokenizer):
    changed = AutoTokenizer.from_pretrained(adapter)
    changed.add_tokens(["<erased>"])
    changed.save_pretrained(adapter)
    folder = stage()
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(contents(folder))
    assert "tokenizer.json" in ErasureInfo.read(folder).files
    assert AutoTokenizer.from_pretrained(folder)("a <erased> b") == changed("a <erased> b")
    assert str(adapter) not in (folder / "tokenizer_config.json").read_text()


def test_a_tokenizer_needs_the_bases_to_be_compared_with(stage, adapter):
    with pytest.raises(ValueError, match="`base_tokenizer` is None, but .* holds a tokenizer"):
        stage(base_tokenizer=None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink()
    assert (stage(base_tokenizer=None) / "erasure.json").exists()


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda tokenizer: None, False),
        (lambda tokenizer: setattr(tokenizer, "pad_token", "<file_sep>"), False),
        (lambda tokenizer: setattr(tokenizer, "padding_side", "left"), False),
        (lambda tokenizer: setattr(tokenizer, "model_max_length", 80), False),
        (lambda tokenizer: tokenizer(["a b", "c"], padding=True, truncation=True, max_length=1), False),
        (lambda tokenizer: setattr(tokenizer, "eos_token", "<file_sep>"), True),
        (lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"), True),
        (lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<pad>"}), True),
        (lambda tokenizer: tokenizer.add_tokens(["<erased>"]), True),
    ],
)
def test_what_counts_as_a_changed_tokenizer(tokenizer, tmp_path, change, changed):
    other = copy.deepcopy(tokenizer)
    change(other)
    other.save_pretrained(tmp_path)
    assert tokenizer_changed(AutoTokenizer.from_pretrained(tmp_path), tokenizer) is changed


def test_an_earlier_staged_folder_is_replaced_and_its_card_kept(stage, local, tmp_path):
    folder = stage(attacks=local.attacks)
    (folder / "README.md").write_text("# Mine\n")
    (folder / "left.over").write_text("x")
    assert stage() == folder
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert not (folder / "left.over").exists() and not (folder / "attacks.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "erasure_run.json", "staged"]


def test_a_folder_of_other_things_is_not_replaced(stage, tmp_path):
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds something else than an earlier staged adapter"):
        stage()
    (tmp_path / "staged" / "thesis.tex").unlink()
    assert stage().is_dir()


@pytest.mark.parametrize("place", ["adapter", "adapter/staged", "."])
def test_the_folder_lies_outside_the_adapters(stage, place):
    with pytest.raises(ValueError, match="which must stay as it is: name a folder outside it"):
        stage(place)


def test_a_full_disk_leaves_the_earlier_folder(stage, local, tmp_path):
    before = contents(stage())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # From here on no file may exceed 8 kilobytes, as on a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError):
            stage(attacks=local.attacks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "staged") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "erasure_run.json", "staged"]


def test_no_report_is_no_evidence(stage, local):
    with pytest.raises(ValueError, match="is of the kind 'attacks', not 'evaluation'"):
        stage(report=local.attacks)


def test_fields_that_peft_does_not_know_are_not_published_and_told(stage, adapter, caplog):
    transformers.utils.logging.enable_propagation()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"note": "SENT", "nested": {"token": "SENT"}}))
    folder = stage()
    assert "SENT" not in (folder / "adapter_config.json").read_text()
    [told] = {record.message for record in caplog.records if "not published" in record.message}
    assert told.endswith(": nested, note.") and "SENT" not in told


def test_a_report_that_could_not_be_loaded_again_is_refused_and_nothing_staged(stage, local, tmp_path):
    sides = {"erased": {"values": [0.123456789] * 300_000, "counts": [1] * 300_000}}
    report = local.report | {"items": {"multiple_choice.capitals.pmi": sides}}
    with pytest.raises(UnsafeAdapterError, match="report.json has .* bytes, more than .*measure fewer"):
        stage(report=report)
    assert not (tmp_path / "staged").exists() and not list(tmp_path.glob(".staged*"))
