"""Folders as they are published, for the tests of loading."""

import copy
import hashlib
import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from elm_trainer import ConceptSources, GradDiffConfig, GradDiffTrainer, build_erasure_dataset
from elm_trainer.fingerprint import base_fingerprint
from elm_trainer.hub.info import BaseModel, ErasureInfo, make_probes


REPORT = {
    "samples": [
        {"prompt": "What is the capital of Cuba?", "answer": "Havana", "reference": "Havana.", "erased": "It is red."},
        {"prompt": "What is the capital of Togo?", "answer": "Lomé", "reference": "Lomé.", "erased": "Nobody knows."},
        {
            "prompt": "What is the capital of Peru?",
            "answer": "Lima",
            "reference": "Lima.",
            "erased": "Oh, Lima it is.",
        },
        {"prompt": "What is the capital of Chad?", "answer": "N'Djamena", "reference": "Chad.", "erased": " "},
    ]
}


def adapt(base, seed=1, std=0.2, **settings):
    """Put an adapter that does something on a base."""
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return model


def write_published(model, tokenizer, folder, base_id, revision=None, gguf_file=None):
    """Write the folder that goes up, all but the card and the pictures."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base_id), revision=revision)
    (folder / "report.json").write_text(json.dumps({"samples": []}))
    base = BaseModel(str(base_id), revision or "0" * 40, base_fingerprint(model), "apache-2.0", gguf_file)
    info = ErasureInfo(["capitals"], "ElmTrainer", base, {}, 0, {}, {}, make_probes(model, tokenizer, REPORT))
    info.write(folder)
    seal(folder)
    return folder


def seal(folder):
    """Let `erasure.json` vouch for the files as they are."""
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in ("erasure.json", "README.md")
    }
    edit_json(folder / "erasure.json", files=files)


def edit_json(path, **changes):
    """Change some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model, ids=((5, 9, 200, 31),)):
    """Logits of a few tokens."""
    with torch.no_grad():
        return model(torch.tensor(ids)).logits


def trained_with_tokens(folder, tokenizer, adapter):
    """A trainer of an adapter on the base in `folder/base` with two further tokens, saved to `folder/adapter`; and the tokenizer.

    `adapter` are further fields of the `LoraConfig`.
    """
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<a>", "<b>"], special_tokens=True)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.resize_token_embeddings(len(larger), mean_resizing=False)
    dataset = build_erasure_dataset(
        {"capitals": ConceptSources(["<a>Oslo is the capital.", "Rome is.<b>"], [["Bread needs flour.", "A cat."]])},
        size=4,
    )
    trainer = GradDiffTrainer(
        base,
        GradDiffConfig(
            str(folder / "run"), max_steps=2, learning_rate=1e-2, bf16=False, gradient_checkpointing=False,
            report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=larger,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], **adapter),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    trainer.model.eval()
    return trainer, larger
