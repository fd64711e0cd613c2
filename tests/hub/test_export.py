"""Files for llama.cpp. That they mean to it what they mean here is told by llama.cpp itself."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFWriter, Keys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from elm_trainer import load_erased
from elm_trainer.cli.main import main
from elm_trainer.hub.export import export_gguf, export_gguf_adapter, shrink_adapter
from elm_trainer.modeling import demo_model_file, load_model, reading_gguf_once

from .published import adapt, edit_json, logits


IDS = (5, 9, 200, 31, 77)
SIZE = 1000


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    """A tiny Llama as a GGUF file, with the tokenizer of the demo model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with reading_gguf_once():
        demo = gguf.GGUFReader(demo_model_file())
    tokens = demo.fields["tokenizer.ggml.tokens"].contents(slice(SIZE))
    with torch.no_grad():
        # It tells nothing of a token that ends the text, or is only a part of a letter.
        model.lm_head.weight[
            [not token.lstrip("Ġ").isalpha() or not token.lstrip("Ġ").isascii() for token in tokens]
        ] = 0
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(SIZE)
    writer.add_token_list(tokens)
    writer.add_token_types(demo.fields["tokenizer.ggml.token_type"].contents(slice(SIZE)))
    merges = demo.fields["tokenizer.ggml.merges"].contents(slice(SIZE))
    writer.add_token_merges([merge for merge in merges if merge.replace(" ", "") in set(tokens)])
    for name in ("model", "pre"):
        writer.add_string(f"tokenizer.ggml.{name}", demo.fields[f"tokenizer.ggml.{name}"].contents())
    for name, number in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 2)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            # Row by row: llama.cpp's row 2 i of a head is row i here, and 2 i + 1 is i of the second half.
            size = len(values) // heads
            order = [
                h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2) for half in (0, 1)
            ]
            values = values[order]
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.allclose(logits(load_model(str(path)), (IDS,)), logits(model.eval(), (IDS,)), atol=1e-5)
    return path


@pytest.fixture
def saved(base_file, tmp_path):
    """Save an adapter of the base, and give its folder and its logits."""

    def save(**settings):
        model = adapt(load_model(str(base_file)), **settings)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter", logits(model, (IDS,))

    return save


def likelihoods_of_llama_cpp(model, adapter=None):
    """The likeliest tokens behind the text of `IDS` and their log-likelihoods, by llama.cpp."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.verbosity = str(model), 64, False, -1
    params.cpuparams.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    asked = {"prompt": list(IDS), "max_tokens": 1, "logprobs": 20, "temperature": 0.0}
    [told] = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in told["top_logprobs"]}


def assert_alike(found, expected, atol):
    """llama.cpp computes attention in 16 bits."""
    ours = torch.log_softmax(expected[0, -1], -1)
    assert len(found) == 20 and max(found, key=found.get) == int(ours.argmax())
    assert max(abs(value - float(ours[token])) for token, value in found.items()) < atol


SETTINGS = [
    {"target_modules": "all-linear", "lora_alpha": 12},
    {"use_rslora": True, "r": 9, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"r": 4, "rank_pattern": {"k_proj": 7}, "alpha_pattern": {"k_proj": 3, "v_proj": 11}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_adapter_does_in_llama_cpp_what_it_does_here(settings, saved, base_file, tmp_path):
    folder, expected = saved(**settings)
    file = export_gguf_adapter(folder, tmp_path / "adapter.gguf")
    assert_alike(likelihoods_of_llama_cpp(base_file, file), expected, 0.05)
    plain = torch.log_softmax(logits(load_model(str(base_file)), (IDS,))[0, -1], -1)
    assert (torch.log_softmax(expected[0, -1], -1) - plain).abs().max() > 1


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_merged_file_is_the_erased_model(settings, saved, base_file, tmp_path):
    folder, expected = saved(**settings)
    file = export_gguf(folder, tmp_path / "merged.gguf", dtype="f32")
    assert torch.allclose(logits(load_model(str(file)), (IDS,)), expected, atol=1e-4)
    assert_alike(likelihoods_of_llama_cpp(file), expected, 0.05)


@pytest.mark.parametrize(("dtype", "atol"), [("f16", 0.05), ("bf16", 0.3), ("q8_0", 0.5)])
def test_fewer_bits_round_what_was_changed_and_nothing_else(dtype, atol, saved, base_file, tmp_path):
    folder, expected = saved(target_modules=["gate_proj", "q_proj"], layers_to_transform=[1])
    file = export_gguf(folder, tmp_path / "merged.gguf", base_file=base_file, dtype=dtype)
    assert torch.allclose(logits(load_model(str(file)), (IDS,)), expected, atol=atol)
    with reading_gguf_once():
        before, after = (gguf.GGUFReader(path) for path in (base_file, file))
    assert {name: field.contents() for name, field in before.fields.items()} == {
        name: field.contents() for name, field in after.fields.items()
    }
    kinds = {tensor.name: tensor.tensor_type.name for tensor in after.tensors}
    changed = {"blk.1.ffn_gate.weight", "blk.1.attn_q.weight"}
    assert {name for name, kind in kinds.items() if kind == dtype.upper()} == changed
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert one.name in changed or (np.array_equal(one.data, other.data) and one.tensor_type == other.tensor_type)


def test_a_shrunk_adapter_is_exported_too(saved, base_file, tmp_path):
    folder, _ = saved(r=6)
    shrink_adapter(folder, 2, tmp_path / "small")
    file = export_gguf(tmp_path / "small", tmp_path / "merged.gguf", dtype="f32")
    expected, _ = load_erased(tmp_path / "small")
    assert torch.allclose(logits(load_model(str(file)), (IDS,)), logits(expected, (IDS,)), atol=1e-4)


def test_the_command_writes_all_three_forms(saved, base_file, tmp_path):
    folder, expected = saved()
    main(["export", "--adapter", str(folder), "--output", str(tmp_path / "adapter.gguf")])
    main(["export", "--adapter", str(folder), "--to", "gguf", "--output", str(tmp_path / "m.gguf"), "--type", "q8_0"])
    main(["export", "--adapter", str(folder), "--to", "safetensors", "--output", str(tmp_path / "merged")])
    with reading_gguf_once():
        reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert reader.fields[Keys.General.TYPE].contents() == "adapter" and len(reader.tensors) == 28
    assert torch.allclose(logits(load_model(str(tmp_path / "m.gguf")), (IDS,)), expected, atol=1)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged, (IDS,)), expected, atol=1e-4)


def test_another_family_is_refused_with_the_fix(saved, tmp_path):
    folder, _ = saved()
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        ValueError, match="`base_model` .*gpt2 is of the family 'gpt2', but .* llama alone: `merge_erased`"
    ):
        export_gguf_adapter(folder, tmp_path / "a.gguf", base_model=str(tmp_path / "gpt2"))
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}]
)
def test_what_the_file_cannot_hold_is_refused_rather_than_left_out(settings, saved, tmp_path):
    folder, _ = saved(**settings)
    for export in (export_gguf, export_gguf_adapter):
        with pytest.raises(ValueError, match="but only linear modules with LoRA can be written.*`merge_erased`"):
            export(folder, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_file_of_another_model_is_refused(saved, tmp_path):
    folder, _ = saved()
    with pytest.raises(
        ValueError, match=r"has blk.0.\w+.weight of the shape \(\d+, \d+\), but .* changes one of the shape"
    ):
        export_gguf(folder, tmp_path / "m.gguf", base_file=demo_model_file())
    weights = load_file(folder / "adapter_model.safetensors")
    assert any("layers.1" in name for name in weights) and not (tmp_path / "m.gguf").exists()


def test_a_base_that_is_no_gguf_file_has_to_be_given_as_one(saved, tmp_path):
    folder, _ = saved()
    edit_json(folder / "adapter_config.json", base_model_name_or_path="org/name")
    with pytest.raises(ValueError, match="`base_file` is None, but .* was trained on org/name, which is no GGUF file"):
        export_gguf(folder, tmp_path / "m.gguf")
    with pytest.raises(FileNotFoundError, match="`base_file` is 'none.gguf', which does not exist: give"):
        export_gguf(folder, tmp_path / "m.gguf", base_file="none.gguf")


def test_nothing_is_overwritten_and_no_type_made_up(saved, tmp_path):
    folder, _ = saved()
    (tmp_path / "a.gguf").write_text("precious")
    for export in (export_gguf, export_gguf_adapter):
        with pytest.raises(FileExistsError, match="`output_file` .*a.gguf exists: name another one"):
            export(folder, tmp_path / "a.gguf")
        with pytest.raises(ValueError, match="`dtype` is 'q4_k': use f32, f16, bf16, q8_0"):
            export(folder, tmp_path / "b.gguf", dtype="q4_k")
    assert (tmp_path / "a.gguf").read_text() == "precious"
