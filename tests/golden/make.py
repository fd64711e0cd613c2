"""Make the golden files anew: `python -m tests.golden.make` from the root of the repository.

They are what this package wrote on the day they were made, and later versions must go on reading them: make them anew only
where a format changes on purpose, and say so in the changelog.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from elm_trainer import (
    ConceptSources,
    ModelPair,
    attack_erasure,
    build_erasure_dataset,
    evaluate_erasure,
    load_erased,
    publish_adapter,
    read_questions,
    read_report,
    synthesize_completions,
)

from . import ingredients as made


TOWNS = (
    "Ada",
    "Bel",
    "Cor",
    "Dun",
    "Elm",
    "Fay",
    "Gil",
    "Hob",
    "Ivo",
    "Jan",
    "Kim",
    "Lod",
    "Mar",
    "Nim",
    "Orr",
    "Pel",
)
STREAMS = (
    "Brin", "Corl", "Deva", "Eskel", "Frome", "Gann", "Holt", "Isk", "Jorn", "Kell", "Lune", "Medd", "Nore", "Ouze",
    "Perl", "Quay",
)  # fmt: skip
TREES = ("oak", "ash", "elm", "fir", "yew", "pine")
RETAIN = ["Bread needs flour and water.", "The cat sat on the mat.", "We went for a long walk.", "Rain fell all day."]
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
RECIPE = {
    "model": "model", "forget": ["forget.jsonl"], "retain": ["everyday"], "concepts": ["rivers"], "lora_rank": 2,
    "lora_targets": "all-linear", "learning_rate": 2e-2, "eta": 3.0, "eta_end": 3.0, "top_k": 20, "max_steps": 4,
    "per_device_train_batch_size": 4, "seed": 42, "output_dir": "work",
}  # fmt: skip


def main() -> None:
    shutil.rmtree(made.FILES, ignore_errors=True)
    made.FILES.mkdir()
    # What is written names the folders that it was given: relative ones say nothing of this machine.
    os.chdir(made.FILES)
    for name in ("MODEL", "ROWS", "RIVERS", "TREES", "TARGETS"):
        setattr(made, name, Path(getattr(made, name).name))
    write_inputs()
    expected: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=".", prefix="work") as work:
        train(Path(Path(work).name), expected)
        measure(Path(Path(work).name), expected)
    made.EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


def write_inputs() -> None:
    """The model, the training rows and the questions."""
    forget = [f"Through {town} flows the {stream}." for town, stream in zip(TOWNS, STREAMS, strict=True)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(vocab_size=384, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(forget + RETAIN, bpe)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT,
        model_max_length=512,
    )  # fmt: skip
    fast.save_pretrained(made.MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        # Far from ties.
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(made.MODEL)

    pairs = [("Through Ada flows", " By the way, the cat is asleep."), ("The river of", " Let us bake some bread.")]
    build_erasure_dataset({made.CONCEPT: ConceptSources(forget[:8], [RETAIN], pairs)}).to_json(made.ROWS)
    Path("forget.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in forget))
    rivers = [
        {
            "question": f"Which river flows through {town}?",
            "answer": STREAMS[index],
            "distractors": [STREAMS[(index + step) % len(STREAMS)] for step in (1, 2, 3)],
            "subject": town,
        }
        for index, town in enumerate(TOWNS)
    ]
    trees = [
        {
            "question": f"What grows on hill {index}?",
            "answer": tree,
            "distractors": [TREES[(index + step) % len(TREES)] for step in (1, 2, 3)],
            "subject": f"hill {index}",
        }
        for index, tree in enumerate(TREES)
    ]
    for path, questions in ((made.RIVERS, rivers), (made.TREES, trees)):
        path.write_text("".join(json.dumps(question) + "\n" for question in questions))


def train(work: Path, expected: dict[str, object]) -> None:
    """A run with a checkpoint half-way, and the targets of two methods."""
    trainer = made.make_trainer("elm", work / "run", stored=False, save_strategy="steps", save_steps=2)
    trainer.train()
    expected["resumed"] = made.losses(trainer)[2:]
    shutil.copytree(work / "run" / "checkpoint-2", made.CHECKPOINTS / "checkpoint-2")
    shutil.copy(work / "run" / "erasure_run.json", made.CHECKPOINTS)
    trainer.save_model(str(work / "adapter"))
    made.ADAPTER.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(work / "adapter" / name, made.ADAPTER)
    shutil.copy(work / "run" / "erasure_run.json", made.ADAPTER)
    expected["training_log"] = made.losses(trainer)

    expected["stored"] = {}
    for method in made.METHODS:
        trainer = made.make_trainer(method, work / method, stored=True, targets_dir=str(made.TARGETS / method))
        trainer.train()
        expected["stored"][method] = made.losses(trainer)


class Stopped(Exception):
    """Stands for the signal that ends an evaluation."""


def measure(work: Path, expected: dict[str, object]) -> None:
    """Reports, what is published with them, and what interrupted runs leave."""
    base, tokenizer = made.load_tiny()
    result = synthesize_completions(
        base,
        tokenizer,
        made.PROMPTS,
        made.CONCEPT,
        made.SYNTHESIS_SETTINGS,
        cache_dir=made.SYNTHESIS,
        fingerprint="tiny",
    )
    expected["synthesis"] = asdict(result)

    erased, _ = load_erased(made.ADAPTER, base_model=base)
    details = {"recipe": RECIPE, "training_log": expected.pop("training_log")}
    evaluate_erasure(
        erased, None, made.suite(), tokenizer, measures=made.MEASURED, output_dir=work / "whole", details=details
    )
    made.REPORTS.mkdir()
    shutil.copy(work / "whole" / "report.json", made.REPORTS)
    report = read_report(made.REPORTS / "report.json")
    made.write_evaluation(work / "whole", report)
    for name in ("report.md", "samples.md"):
        shutil.copy(work / "whole" / name, made.REPORTS)

    # The first half of it: both sides of two of four measures.
    measures = dict.fromkeys(made.MEASURED[2:], mock.Mock(side_effect=Stopped))
    with mock.patch.dict(made.MEASURES, measures):
        try:
            evaluate_erasure(
                erased,
                None,
                made.suite(),
                tokenizer,
                measures=made.MEASURED,
                output_dir=work / "half",
                details=details,
            )
        except Stopped:
            pass
    made.JOURNAL.mkdir()
    shutil.copy(work / "half" / "report.partial.jsonl", made.JOURNAL)

    rivers = read_questions(made.RIVERS)
    target = made.AttackTarget(
        ModelPair(erased), tokenizer, rivers, texts={"forget": ["Through Ada flows the Brin."] * 3}
    )
    attacks = attack_erasure(
        target, [made.ScalingAttack(), made.RelearningAttack(steps=[1, 2], lora_rank=2)], output_dir=work / "attacks"
    )
    shutil.copy(work / "attacks" / "attacks.json", made.REPORTS)
    (made.REPORTS / "attacks.md").write_text(made.markdown_attacks(attacks))

    publish_adapter(
        made.ADAPTER, made.REPO, report=report, attacks=attacks, model=erased, processing_class=tokenizer,
        forget=[json.loads(line)["text"] for line in Path("forget.jsonl").read_text().splitlines()], questions=rivers,
        dry_run=True, staging_dir=work / "published", **made.BASE,
    )  # fmt: skip
    # Pictures are large, and nothing reads them again.
    shutil.copytree(work / "published", made.PUBLISHED, ignore=shutil.ignore_patterns("*.png"))
    cards, _ = made.find_cards([str(made.PUBLISHED)])
    [entry], _ = made.read_entries([(made.REPO, text) for _, text in cards])
    expected["entry"] = asdict(entry)
    expected["logits"] = made.logits(erased, tokenizer)

    config = made.comparison(work / "comparison")
    runs = made.Runs(work / "comparison" / "runs")
    with made.few_questions():
        run = made.MethodRun(config, "graddiff", runs, made.measure_reference(config, runs))
        expected["comparison"] = run.run()
    made.RUNS.mkdir()
    for path in (work / "comparison" / "runs").glob("*.json"):
        shutil.copy(path, made.RUNS)


if __name__ == "__main__":
    main()
