import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from elm_trainer.hub.errors import UnsafeAdapterError
from elm_trainer.hub.load import load_erased
from elm_trainer.hub.safety import check_adapter_config, check_folder, check_names, check_tensors
from elm_trainer.hub.untrusted import read_header

from .published import adapt, edit_json, logits, seal, write_published


TARGET = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.fixture
def folder(base_folder, tokenizer, tmp_path):
    """A published adapter, sound so far."""
    erased = adapt(AutoModelForCausalLM.from_pretrained(base_folder))
    return write_published(erased, tokenizer, tmp_path / "adapter", base_folder)


@pytest.fixture
def weights(folder):
    return folder / "adapter_model.safetensors"


def refused(folder, message):
    """Assert that a hostile folder, whose hashes its author made fit, is not loaded."""
    seal(folder)
    with pytest.raises(UnsafeAdapterError, match=message):
        load_erased(folder)


class Evil:
    """A pickle that creates a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("beside_safetensors", [True, False])
def test_pickled_weights_are_refused_and_nothing_runs(beside_safetensors, folder, weights, tmp_path):
    pickled = tmp_path / "evil"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(pickled)))
    if not beside_safetensors:
        weights.unlink()
    refused(folder, r"holds adapter_model.bin: a file of the type .bin may run code when it is read")
    assert not pickled.exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert pickled.exists()  # reading it would have


def test_code_named_by_auto_map_is_refused_and_nothing_runs(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    refused(folder, r"tokenizer_config.json holds `auto_map`, which names code to run")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')")
    refused(folder, r"holds evil.py: an adapter needs no code")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "processor_config.json"])
def test_auto_map_is_found_in_any_json_however_deep_or_spelled(name, folder):
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    raw = json.dumps(content | {"harmless": [{"auto_map": "evil.Model"}]})
    path.write_text(raw.replace("auto_map", "auto\\u005fmap"))
    refused(folder, f"{name} holds `auto_map`")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil.safetensors", "leads out of its folder"),
        ("tokenizer/../../evil", "leads out of its folder"),
        ("a//b", "leads out of its folder"),
        ("./a", "leads out of its folder"),
        ("/etc/passwd", "is an absolute path"),
        ("C:evil.json", "is an absolute path"),
        ("..\\evil", "holds a backslash"),
        ("evil\0.json", "holds control characters"),
        ("evil\n.json", "holds control characters"),
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(name, reason):
    with pytest.raises(UnsafeAdapterError, match=f"org/repo holds a file named .*{reason}"):
        check_names(["adapter_config.json", name], "org/repo")


@pytest.mark.parametrize(
    "name",
    [
        "a.pt",
        "deep/b.PTH",
        "c.ckpt",
        "d.pkl",
        "pytorch_model.bin",
        "training_args.bin",
        "x.npy",
        "e.py",
        "f.so",
        "g.pyc",
    ],
)
def test_pickles_and_code_are_refused_wherever_they_lie(name):
    with pytest.raises(UnsafeAdapterError, match=f"org/repo holds {name}"):
        check_names([name], "org/repo")


def test_what_is_published_passes(folder):
    names = ["README.md", "report.png", ".gitattributes", "tokenizer.json", "chat_template.jinja", "attacks.png"]
    check_names([*names, *(path.name for path in folder.iterdir())], "org/repo")
    assert check_folder(folder)["peft_type"] == "LORA"


def test_only_a_plain_folder_may_hold_what_a_trainer_leaves(folder):
    names = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "zero_to_fp32.py"]
    names += ["pytorch_model_fsdp.bin", "optimizer.bin"]
    names += ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    for name in names:
        (folder / name).write_bytes(b"never read")
        with pytest.raises(UnsafeAdapterError, match=f"org/repo holds {name}"):
            check_names([name], "org/repo")
    refused(folder, "holds (training_args|optimizer|scheduler|rng_state|zero_to_fp32|pytorch_model|mp_rank|bf16_zero)")
    (folder / "erasure.json").unlink()
    model, _ = load_erased(folder)
    assert logits(model).isfinite().all()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UnsafeAdapterError, match="adapter_model.bin"):
        load_erased(folder)


def test_a_name_in_erasure_json_that_leads_out_is_refused(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    content = json.loads((folder / "erasure.json").read_text())
    edit_json(folder / "erasure.json", files=content["files"] | {"../secret": "0"})
    with pytest.raises(UnsafeAdapterError, match=r"holds a file named '../secret', which leads out"):
        load_erased(folder)


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_link_out_of_the_folder_is_refused(as_folder, folder, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "outside" if as_folder else tmp_path / "outside" / "secret")
    with pytest.raises(UnsafeAdapterError, match="holds link, a link to .* outside of it"):
        load_erased(folder)


def test_links_within_the_folder_and_into_the_blobs_of_the_cache_are_fine(folder, tmp_path):
    snapshot, blobs = tmp_path / "cache" / "snapshots" / ("0" * 40), tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / "copy.json").symlink_to("report.json")
    check_folder(folder)
    (folder / "copy.json").unlink()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    check_folder(snapshot)
    (tmp_path / "cache" / "secret").write_text("x")
    (snapshot / "link").symlink_to("../../blobs/../secret")
    with pytest.raises(UnsafeAdapterError, match="holds link, a link to"):
        check_folder(snapshot)


def test_what_is_no_plain_file_is_refused(folder):
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnsafeAdapterError, match="holds pipe, which is not a plain file"):
        load_erased(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_named(name, folder):
    (folder / name).unlink()
    refused(folder, f"holds no {name}: it is not the folder of an adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "XLORA"}, "`peft_type` is 'XLORA'. Only LORA can be checked"),
        ({"peft_type": "EVIL"}, "`peft_type` is 'EVIL'"),
        ({"peft_type": None}, "`peft_type` is None"),
        ({"task_type": "SEQ_CLS"}, "`task_type` is 'SEQ_CLS'"),
        (
            {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
            "`auto_mapping` is .* imports a lib",
        ),
        ({"megatron_config": {"a": 1}}, "`megatron_config` is .* imports a library"),
        ({"megatron_core": "antigravity"}, "`megatron_core` is 'antigravity'. It imports a library"),
        ({"loftq_config": {"loftq_bits": 4}}, "`loftq_config` is .* quantizes weights"),
        ({"eva_config": {"rho": 2.0}}, "`eva_config`"),
        ({"corda_config": {"cache_file": "evil.pt"}}, "`corda_config` is .* reads a pickled cache"),
        ({"lora_ga_config": {"cache_file": "evil.pt"}}, "`lora_ga_config`"),
        ({"arrow_config": {"top_k": 2}}, "`arrow_config`"),
        ({"kasa_config": {"beta": 0.1}}, "`kasa_config` is .* truncates weights of the base"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "`layer_replication`"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "`runtime_config`"),
        ({"alora_invocation_tokens": [1]}, "`alora_invocation_tokens`"),
        ({"bias": "all"}, "`bias` is 'all'. It overwrites biases of the base"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa', which reads or rewrites the base"),
        ({"init_lora_weights": "loftq"}, "`init_lora_weights` is 'loftq'"),
        ({"init_lora_weights": 1}, "`init_lora_weights` is 1"),
        ({"r": 0}, "`r` is 0, which PEFT does not take"),
        ({"r": 1 << 40}, "`r` is 1099511627776"),
        ({"r": True}, "`r` is True"),
        ({"lora_alpha": float("inf")}, "`lora_alpha` is inf"),
        ({"lora_alpha": "16"}, "`lora_alpha` is '16'"),
        ({"target_modules": {"q_proj": 1}}, "`target_modules` is"),
        ({"modules_to_save": [["a"]]}, "`modules_to_save` is"),
        ({"rank_pattern": {"q_proj": -1}}, "`rank_pattern` is"),
        ({"base_model_name_or_path": 5}, "`base_model_name_or_path` is 5"),
    ],
)
def test_settings_through_which_peft_imports_loads_or_rewrites_are_refused(changes, message, folder):
    edit_json(folder / "adapter_config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1},
        {"r": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.5}},
        {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
        {"target_modules": ".*q_proj", "layers_to_transform": None},
        {"a_field_of_later_versions": {"x": 1}, "peft_version": "9.9"},
    ],
)
def test_plain_lora_passes(changes, folder):
    content = json.loads((folder / "adapter_config.json").read_text())
    check_adapter_config(content | changes, folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
        (b'{"a":' * 30 + b"1" + b"}" * 30, "nested 30 levels deep, more than 20"),
        (b'{"peft_type": "LORA", "peft_type": "XLORA"}', "the key 'peft_type' stands twice"),
        (b"{", "not JSON that can be read safely"),
        (b"\xff\xfe", "not JSON that can be read safely"),
        (b"[]", "holds a list, not the settings of an adapter"),
        (b" " * 10_000_001, "has 10000001 bytes, more than 10000000"),
    ],
)
def test_settings_that_no_one_would_write_are_refused(raw, message, folder):
    (folder / "adapter_config.json").write_bytes(raw)
    refused(folder, message)


def write_safetensors(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(start, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({}, b"", 1 << 62, "the header says it has 4611686018427387904 bytes, but the file has 10"),
        (b" " * 10_000_001, b"", None, "the header has 10000001 bytes, more than 10000000"),
        (b"{", b"", None, "the header cannot be read"),
        (b"[1]", b"", None, "the header cannot be read"),
        (b'{"a": 1}', b"", None, "the header cannot be read"),
        (b'{"a": {}, "a": {}}', b"", None, "the key 'a' stands twice"),
        (
            {"a": entry(0, 8), "b": entry(4, 12)},
            b"0" * 12,
            None,
            "the header cannot be read .*invalid offset for tensor `b`",
        ),
        (
            {"a": entry(0, 4), "b": entry(8, 12)},
            b"0" * 12,
            None,
            "the header cannot be read .*invalid offset for tensor `b`",
        ),
        ({"a": entry(0, 8)}, b"0" * 4, None, "the header cannot be read .*file not fully covered"),
        ({"a": entry(0, 8, [3])}, b"0" * 8, None, "the header cannot be read .*invalid shape"),
        ({"a": entry(0, 8, [1 << 40, 1 << 40])}, b"0" * 8, None, "the header cannot be read .*overflow"),
        ({"a": entry(0, 8, [-2])}, b"0" * 8, None, "the header cannot be read"),
        ({"a": entry(0, 8, [8], "I8")}, b"0" * 8, None, "tensor 'a' is of the type 'I8', but adapters are F32"),
    ],
)
def test_a_broken_header_is_named(header, data, length, message, folder, weights):
    write_safetensors(weights, header, data, length)
    refused(folder, message)


def test_an_empty_file_of_weights_is_named(weights, folder):
    weights.write_bytes(b"")
    refused(folder, "the header says it has 0 bytes, but the file has 0")


def test_a_sound_header_is_read(weights):
    found = read_header(weights)
    expected = load_file(weights)
    assert found == {name: tuple(tensor.shape) for name, tensor in expected.items()}


def change_tensors(weights, change):
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({TARGET: torch.zeros(8, 32)}),
            rf"tensor '{TARGET}' has the shape \[8, 32\], but \[4, 32\] fits",
        ),
        (lambda t: t.update({TARGET: torch.zeros(4, 64)}), r"has the shape \[4, 64\], but \[4, 32\] fits the base"),
        (lambda t: t.pop(TARGET), f"1 tensors of the configured adapter are missing, such as '{TARGET}'"),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)}),
            "tensor 'base_model.model.model.norm.weight' is no weight of the configured adapter, so it would overwrite",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.base_layer.weight": torch.zeros(64, 32)}),
            "up_proj.base_layer.weight' is no weight of the configured adapter",
        ),
        (lambda t: t[TARGET][0].fill_(float("nan")), f"tensor '{TARGET}' holds NaN or infinity"),
        (lambda t: t[TARGET][3].fill_(float("-inf")), f"tensor '{TARGET}' holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, folder, weights):
    change_tensors(weights, change)
    refused(folder, message)


def test_a_tensor_of_the_base_would_have_been_overwritten(folder, weights, base_folder):
    """Why such a tensor is refused: PEFT itself takes it."""
    from peft import PeftModel

    change_tensors(weights, lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)}))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
    assert model.get_base_model().model.norm.weight.abs().max() == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"target_modules": r".*layers\.0\..*(q|up)_proj"},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "lora_bias": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
        {"target_modules": ["k_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    ],
)
def test_every_plain_lora_fits_its_own_base(settings, base_folder, tmp_path):
    model = adapt(AutoModelForCausalLM.from_pretrained(base_folder), **settings)
    model.save_pretrained(tmp_path / "plain")
    loaded, _ = load_erased(tmp_path / "plain")
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_of_another_rank_or_layer_is_named(folder, weights):
    edit_json(folder / "adapter_config.json", r=8)
    refused(folder, r"has the shape \[4, 64\], but \[8, 64\] fits the base and `adapter_config.json`")
    edit_json(folder / "adapter_config.json", r=4, target_modules=["up_proj"], layers_to_transform=[0])
    refused(folder, "is no weight of the configured adapter")
    edit_json(folder / "adapter_config.json", target_modules=["no_such_module"])
    refused(folder, "PEFT makes no adapter of `adapter_config.json` on this base")


def test_checking_tensors_leaves_the_base_alone(folder, weights, base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    check_tensors(weights, config, base)
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
