"""Tests that run on a card where they are marked `gpu`, and on the CPU otherwise: the same bodies, the device from a fixture."""

import pytest
import torch
from peft import LoraConfig

from elm_trainer import ConceptSources, ElmConfig, ElmTrainer, build_erasure_dataset, load_texts

from ..methods.methods import tiny


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(scope="session")
def rows(tokenizer):
    pairs = [("The capital of", " Norway is one thing, cats are another."), ("Bread", " needs flour, and some water.")]
    # Such as hold a term of the tests' anchor dictionary.
    texts = load_texts("capitals", processing_class=tokenizer).filter(lambda row: " city " in row["text"])
    return build_erasure_dataset(
        {"capitals": ConceptSources(texts, ["capitals-near"], pairs)}, size=6, processing_class=tokenizer
    )


@pytest.fixture
def make(tokenizer, rows, tmp_path, device):
    """Makes a trainer of a tiny model with an adapter whose both factors are random, on the device or another one."""

    def build(trainer=ElmTrainer, config=ElmConfig, on=device, model=None, **fields):
        settings = dict(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            bf16=False,
            activation_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=on == "cpu",
        )
        made = trainer(
            tiny("llama", len(tokenizer)) if model is None else model,
            config(**settings | fields),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            # What PEFT begins with, zeros, would give one of the two factors no gradient.
            for name, parameter in made.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return made

    return build
