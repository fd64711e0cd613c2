"""An adapter with tokens of its own, from training to the Hub and back."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from elm_trainer import (
    evaluate_erasure,
    load_erased,
)
from elm_trainer.hub.errors import BaseMismatchError
from elm_trainer.hub.publish import publish_adapter

from .published import trained_with_tokens
from .reports import _suite


BASE, REPO = "alice/tiny-base", "alice/erased"
ADAPTERS = {
    "nothing more": {},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
    "a whole head": {"modules_to_save": ["lm_head"]},
    "embeddings and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the tokens alone": {"trainable_token_indices": [300, 301]},
}


@pytest.fixture(scope="module")
def small(tokenizer):
    small = tokenizer.train_new_from_iterator(["What is the capital of Peru? It is Lima. Nobody knows."] * 3, 300)
    small.chat_template = None
    assert len(small) == 300
    return small


def train(small, tied, adapter, hub_api, folder):
    """A base on the Hub, and a trainer of an adapter on it with two further tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, pad_token_id=small.pad_token_id, tie_word_embeddings=tied, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    small.save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\nA tiny base.\n")
    hub_api.create_repo(BASE)
    hub_api.upload_folder(repo_id=BASE, folder_path=folder / "base")
    return trained_with_tokens(folder, small, adapter)


def measured(trainer, tokenizer):
    details = {"recipe": {"model": BASE, "seed": 0}}
    return evaluate_erasure(
        trainer.model, None, _suite(), tokenizer, measures=["multiple-choice", "open-answers"], details=details
    )


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_published_is_loaded_with_equal_logits(name, tied, small, hub, hub_api, tmp_path):
    trainer, tokenizer = train(small, tied, ADAPTERS[name], hub_api, tmp_path)
    report = measured(trainer, tokenizer)
    ids = torch.tensor([tokenizer("<a>Oslo is<b>")["input_ids"]])
    with torch.no_grad():
        live = trainer.model(ids).logits

    publish_adapter(
        tmp_path / "adapter", REPO, report=report, model=trainer.model, processing_class=tokenizer, base_model=BASE,
        forget=[], api=hub_api,
    )  # fmt: skip

    model, loaded = load_erased(REPO, verify=True)
    assert loaded("<a>Oslo is<b>")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, live)
        torch.testing.assert_close(trainer.model(ids).logits, live)


def test_a_base_on_the_hub_with_other_embeddings_is_refused(small, hub, hub_api, tmp_path):
    trainer, tokenizer = train(small, False, {}, hub_api, tmp_path)
    report = measured(trainer, tokenizer)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.get_input_embeddings().weight.data[:] += 1
    other.save_pretrained(tmp_path / "other")
    hub_api.upload_folder(repo_id=BASE, folder_path=tmp_path / "other")

    with pytest.raises(BaseMismatchError, match="whose weights are not those of `model`"):
        publish_adapter(
            tmp_path / "adapter", REPO, report=report, model=trainer.model, processing_class=tokenizer,
            base_model=BASE, forget=[], api=hub_api,
        )  # fmt: skip
