import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from elm_trainer import load_texts
from elm_trainer.data.collator import align
from elm_trainer.data.tokens import text_ids


SCRIPT = Path(__file__).parents[2] / "examples" / "readout.py"


def test_what_is_put_in_at_a_layer_decides_what_lies_above_it(tiny_model, tokenizer, tmp_path, monkeypatch, capsys):
    tiny_model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(sys, "argv", ["readout.py", f"--model={tmp_path / 'tiny'}", "--rows=1"])
    spec = importlib.util.spec_from_file_location("readout", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main()
    first, *rest = capsys.readouterr().out.splitlines()
    stack = tiny_model.get_decoder().layers
    assert len(rest) == len(stack)
    # Slowly: the last layer's states go through the norm and the head alone.
    for row in load_texts("capitals", processing_class=tokenizer):
        ids, novices = text_ids(tokenizer, row["text"]), [text_ids(tokenizer, text) for text in row["novices"]]
        if aligned := align(ids, novices)[1:]:
            break
    given = []
    handle = stack[-1].register_forward_hook(
        lambda _, args, output: given.append(output if torch.is_tensor(output) else output[0])
    )
    with torch.no_grad():
        logs, *others = (
            tiny_model(input_ids=torch.tensor([text])).logits[0].log_softmax(-1) for text in (ids, *novices)
        )
        handle.remove()
        apart = []
        for own, *at in aligned:
            novice = torch.stack([other[place].exp() for other, place in zip(others, at, strict=True)]).mean(0).log()
            apart.append((logs[own].exp() * (logs[own] - novice)).sum().item())
        own, *at = aligned[apart.index(max(apart))]
        state = torch.stack([states[0, place] for states, place in zip(given[1:], at, strict=True)]).mean(0)
        patched = tiny_model.lm_head(tiny_model.get_decoder().norm(state)).log_softmax(-1)
    token = ids[own + 1]
    assert first.startswith(f"1 texts: {logs[own, token]:.2f} by the expert")
    value = float(re.fullmatch(rf"layer +{len(stack) - 1} +(\S+) +\S+ of the way to the novice", rest[-1])[1])
    assert value == pytest.approx(patched[token].item(), abs=0.02)
