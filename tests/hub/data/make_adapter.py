"""Make an adapter with the installed PEFT: `python tests/hub/data/make_adapter.py`.

Another version is used with `pip install --no-deps --target /tmp/peft peft==0.18.0` and `PYTHONPATH=/tmp/peft`.
Weights come from sines rather than a generator, so that every version of every library makes the same ones.
"""

import json
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM


FOLDER = Path(__file__).parent / "adapters"
IDS = [[5, 9, 120, 31, 7, 64]]


def tiny_base() -> LlamaForCausalLM:
    """The base that the adapters belong to."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    fill(model, 0.2)
    return model


def fill(model: torch.nn.Module, size: float, only: str = "") -> None:
    """Set parameters to sines of their places, of another phase for each."""
    with torch.no_grad():
        for phase, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if only in name:
                places = torch.arange(parameter.numel(), dtype=torch.float64)
                values = size * torch.sin(1.7 * places + phase)
                parameter.copy_(values.view_as(parameter) + ("norm" in name))


def main() -> None:
    settings = dict(r=2, lora_alpha=4, target_modules="all-linear", layers_to_transform=None, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_base(), peft.LoraConfig(**settings)).eval()
    fill(model, 0.3, only="lora_")
    folder = FOLDER / f"peft-{peft.__version__}"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits
    (folder / "logits.json").write_text(json.dumps([[round(x, 5) for x in row] for row in logits[0].tolist()]))


if __name__ == "__main__":
    main()
