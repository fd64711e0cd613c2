import importlib.util
import re
import sys
from pathlib import Path

import torch

from elm_trainer import find_readout, load_texts


SCRIPT = Path(__file__).parents[2] / "examples" / "readout.py"


def test_each_layer_gets_a_row_and_the_last_says_what_to_set(tiny_model, tokenizer, tmp_path, monkeypatch, capsys):
    tiny_model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(sys, "argv", ["readout.py", f"--model={tmp_path / 'tiny'}", "--texts=2"])
    spec = importlib.util.spec_from_file_location("readout", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main()
    first, *rows, last = capsys.readouterr().out.splitlines()
    found = find_readout(
        tiny_model.to(torch.float32), load_texts("capitals", processing_class=tokenizer), tokenizer, texts=2
    )
    assert first == f"2 texts: {found.expert:.2f} by the expert, {found.novice:.2f} by the novice"
    values = [
        float(re.fullmatch(rf"layer +{n} +(\S+) of the way to the novice", row)[1]) for n, row in enumerate(rows)
    ]
    assert values == [round(share, 2) for share in found.shares] and len(values) == 2
    assert last.startswith(f"lora_layers {found.lora_layers}, state_layers [{found.layers[-1]}]: ")
