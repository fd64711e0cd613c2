"""Write the package's everyday texts: SmolLM2-135M-Instruct's own samples. `python examples/sample_everyday.py`."""

import json
import random
from pathlib import Path

import yaml

import elm_trainer
from elm_trainer import load_model_and_tokenizer
from elm_trainer.evaluation.fluency import as_prompt
from elm_trainer.synthesis import SynthesisConfig, sample_texts


HELD_OUT = 30


def main() -> None:
    folder = Path(elm_trainer.__file__).parent / "data" / "texts"
    prompts = yaml.safe_load((folder / "everyday.yaml").read_text(encoding="utf-8"))
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")
    asked = [
        *prompts["openings"],
        *(f"Question: {question}\nAnswer:" for question in prompts["questions"]),
        *(as_prompt(tokenizer, question) for question in prompts["questions"]),
    ]
    config = SynthesisConfig(plausibility=0.0, top_k=100, temperature=0.9, max_new_tokens=40, batch_size=35)
    texts = sample_texts(model, tokenizer, asked, config)
    random.Random(0).shuffle(texts)
    for name, part in (("everyday-held-out", texts[:HELD_OUT]), ("everyday", texts[HELD_OUT:])):
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
