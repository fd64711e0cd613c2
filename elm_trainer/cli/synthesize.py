"""Write the fluent completions of the consistency term, one JSON line a pair of prompt and completion.

`elm synthesize --concept capitals --prompts prompts.txt --output pairs.jsonl`
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..concept import load_concept
from . import hush_libraries
from .options import CommandLine, check_dtype, named


@dataclass
class SynthesizeArguments:
    """What is synthesized; the settings of the sampler are those of `SynthesisConfig`."""

    concept: str = field(metadata={"help": "Preset or YAML file of the concept."})
    prompts: str = field(metadata={"help": "File (.txt, .jsonl, .csv, .parquet) with the beginnings of forget texts."})
    output: str = field(metadata={"help": "The .jsonl file to write."})
    model: str = field(default="smollm2-135m-instruct", metadata={"help": "Hub id, folder or .gguf file."})
    dtype: str = field(default="float32", metadata={"help": "Data type of the weights."})
    column: str = field(default="text", metadata={"help": "Column of the prompts."})


@dataclass
class SamplerSettings:
    """The fields of `SynthesisConfig`, as `--help` shows them without the seconds that its import takes."""

    _argument_group_name = "of the sampler"

    gamma: float = field(default=3.0, metadata={"help": "Guidance."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_k: int = field(default=50, metadata={"help": "Tokens kept per step."})
    plausibility: float = field(default=0.05, metadata={"help": "Plausibility constraint."})
    max_new_tokens: int = field(default=24, metadata={"help": "Longest completion in tokens."})
    max_new_tokens_from: int | None = field(default=None, metadata={"help": "Draw that length from here on."})
    prompt_characters: str | None = field(default=None, metadata={"help": "Range of prompts' lengths, as 50-300."})
    pivots: str = field(default="plain", metadata={"help": "Pivot sentences.", "choices": ["plain", "digressing"]})
    batch_size: int = field(default=16, metadata={"help": "Prompts per batch."})
    seed: int = field(default=0, metadata={"help": "Seed."})
    min_words: int = field(default=5, metadata={"help": "Fewest words of a completion."})
    keep_on_topic: bool = field(default=False, metadata={"help": "Keep completions that name the concept."})
    max_repetition: float = field(default=0.3, metadata={"help": "Largest share of repeated 3-grams."})


def main(argv: list[str] | None = None) -> None:
    line = CommandLine(
        "synthesize",
        __doc__,
        argv,
        own=SynthesizeArguments,
        config="elm_trainer.SynthesisConfig",
        common=SamplerSettings,
    )
    # What can be known without torch, which takes seconds to load, is said before.
    [arguments, _] = line.early()
    load_concept(arguments.concept)
    hush_libraries()
    from .. import load_model_and_tokenizer, load_texts, synthesize_completions
    from ..files import write_rows
    from ..fingerprint import model_fingerprint

    arguments, config = line.complete()
    check_dtype(arguments.dtype)
    concept = load_concept(arguments.concept)
    prompts = load_texts(arguments.prompts, column=arguments.column)["text"][:]
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)

    with named("model", arguments.model):
        model, tokenizer = load_model_and_tokenizer(arguments.model, dtype=arguments.dtype)
    result = synthesize_completions(
        model,
        tokenizer,
        prompts,
        concept,
        config,
        cache_dir=output.parent / "synthesis",
        fingerprint=model_fingerprint(model),
    )
    write_rows(output, ({"prompt": prompt, "completion": completion} for prompt, completion in result.pairs))
