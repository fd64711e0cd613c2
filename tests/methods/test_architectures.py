"""Texts of a step do not see each other, in any causal architecture that transformers can build tiny."""

import logging

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from elm_trainer import ConceptSources, GradDiffConfig, GradDiffTrainer, build_erasure_dataset


# Sizes by the names that configs have for them.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers",), 4),
    **dict.fromkeys(("n_layer", "n_layers"), 3),
    **dict.fromkeys(("num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "sliding_window", "q_lora_rank", "kv_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "vocab_size": 64, "num_key_value_heads": 2, "num_experts_per_tok": 2, "is_decoder": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What some configs need beside, or in another way.
OWN = {
    "falcon": {"alibi": True},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 8},
    "gemma3": {
        "text_config": {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "pad_token_id": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama4_text": {"attention_chunk_size": 8, "intermediate_size_mlp": 48},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 32},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "chunk_size": 8},
}
ARCHITECTURES = """
afmoe apertus arcee aria_text bart beam bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot
blenderbot-small bloom camembert codegen cohere cohere2 cohere2_moe ctrl cwm data2vec-text deepseek_v4 diffllama doge
electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2
gemma3 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa
granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax
inkling2_text inkling_text jais2 jamba jetmoe kolibri1 laguna lfm2 lfm3 llama llama4_text mamba marian mbart
megatron-bert mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral
modernbert-decoder moshi mpt mvp nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus
persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
recurrent_gemma rembert roberta roberta-prelayernorm roformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr
vaultgemma whisper xglm xlm-roberta xlm-roberta-xl xlstm
""".split()


@pytest.fixture(scope="module")
def words():
    vocabulary = {word: index for index, word in enumerate(["[pad]", "[bos]", "[eos]", *(f"w{i}" for i in range(61))])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="[eos]"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="[pad]", bos_token="[bos]", eos_token="[eos]", unk_token="[eos]"
    )


@pytest.fixture(scope="module")
def rows():
    """Texts of 21, 5, 12 and 3 words: longer and shorter than the windows."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        " ".join(f"w{i}" for i in torch.randint(61, (size,), generator=generator).tolist())
        for size in (21, 5, 12, 3, 9, 17, 4, 8)
    ]
    return build_erasure_dataset({"bio": ConceptSources(texts[:4], [texts[4:]])}, size=4)


def build(architecture):
    config_class = CONFIG_MAPPING[architecture]
    fields = {name: value for name, value in SIZES.items() if name in config_class().to_dict()}
    torch.manual_seed(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config_class(**{**fields, **OWN.get(architecture, {})})).eval()


def adapted(model):
    """Names of some linear modules in the layers."""
    head, kinds = model.get_output_embeddings(), (torch.nn.Linear, Conv1D)
    modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    linear = [name for name, module in modules if isinstance(module, kinds) and "Router" not in type(module).__name__]
    other = [name for name, module in modules if module is head or not isinstance(module, kinds)]
    # PEFT refuses what the state spaces of Mamba read without a call, and one of DeepSeek multiplies by groups.
    return sorted({*linear} - {*other, "router", "out_proj", "conv1d", "o_a_proj"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_packed_texts_are_those_of_texts_alone(architecture, words, rows, settings):
    model = build(architecture)
    with torch.no_grad():
        alone = [
            [
                model(input_ids=words(text, return_tensors="pt")["input_ids"], use_cache=False).logits[0, :-1]
                for text in rows[side]
            ]
            for side in ("forget", "retain")
        ]
    trainer = GradDiffTrainer(
        model, settings(GradDiffConfig, output_dir="unused"), train_dataset=rows, processing_class=words,
        peft_config=LoraConfig(r=2, target_modules=adapted(model)),
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.forward_positions(trainer.model, {side: batch[side] for side in ("forget", "retain")})
    for side, expected in zip(("forget", "retain"), alone, strict=True):
        torch.testing.assert_close(found[side], torch.cat(expected), rtol=1e-4, atol=1e-5)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()


def test_a_model_whose_texts_keep_apart_packs_them_and_another_says_that_it_does_not(words, rows, settings, caplog):
    logging.getLogger("elm_trainer").addHandler(caplog.handler)
    shapes = {}
    for architecture in ("llama", "opt"):
        model = build(architecture)
        trainer = GradDiffTrainer(
            model, settings(GradDiffConfig), train_dataset=rows, processing_class=words,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        )  # fmt: skip
        batch = trainer.data_collator(list(trainer.train_dataset))
        shapes[architecture] = len(trainer.packed.pack(trainer.model, [batch["forget"], batch["retain"]]).tokens)
        assert ("texts that share a row see each other" in caplog.text) == (architecture == "opt")
    assert shapes["llama"] < shapes["opt"] == 8


def test_a_router_that_no_adapter_fits_is_named(words, rows, settings):
    with pytest.raises(
        ValueError, match=r"forward through the adapter fails .*adapts \['router'\].*`exclude_modules`"
    ):
        GradDiffTrainer(
            build("llama4_text"), settings(GradDiffConfig), train_dataset=rows, processing_class=words,
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )  # fmt: skip
