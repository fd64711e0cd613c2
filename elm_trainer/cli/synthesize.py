"""Write the fluent completions of the consistency term, one JSON line a pair of prompt and completion.

`elm synthesize --concept capitals --prompts prompts.txt --output pairs.jsonl`
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..checks import SynthesisConfig
from ..concept import load_concept
from . import hush_libraries
from .options import CommandLine, check_dtype, load_named


@dataclass
class SynthesizeArguments:
    """What is synthesized; the settings of the sampler are those of `SynthesisConfig`."""

    concept: str = field(metadata={"help": "Preset or YAML file of the concept."})
    prompts: str = field(metadata={"help": "File (.txt, .jsonl, .csv, .parquet) with the beginnings of forget texts."})
    output: str = field(metadata={"help": "The .jsonl file to write."})
    model: str = field(default="smollm2-135m-instruct", metadata={"help": "Hub id, folder or .gguf file."})
    dtype: str = field(default="float32", metadata={"help": "Data type of the weights."})
    column: str = field(default="text", metadata={"help": "Column of the prompts."})


def main(argv: list[str] | None = None) -> None:
    line = CommandLine(
        "synthesize",
        __doc__,
        argv,
        own=SynthesizeArguments,
        config="elm_trainer.checks.SynthesisConfig",
        common=SynthesisConfig,
    )
    # What can be known without torch, which takes seconds to load, is said before.
    arguments, config = line.complete()
    concept = load_concept(arguments.concept)
    hush_libraries()
    from .. import load_texts, synthesize_completions
    from ..files import write_rows
    from ..fingerprint import model_fingerprint

    check_dtype(arguments.dtype)
    prompts = load_texts(arguments.prompts, column=arguments.column)["text"][:]
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_named("model", arguments.model, arguments.dtype)
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
