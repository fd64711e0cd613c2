"""Write the fluent completions of the consistency term, one JSON line a pair of prompt and completion.

python examples/synthesize.py --concept capitals --prompts prompts.txt --output pairs.jsonl
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from elm_trainer.scripts import help_at_once, hush_libraries


@dataclass
class SynthesizeArguments:
    """What is synthesized; the settings of the sampler are those of `SynthesisConfig`."""

    concept: str = field(metadata={"help": "Preset or YAML file of the concept."})
    prompts: str = field(metadata={"help": "File (.txt, .jsonl, .csv, .parquet) with the beginnings of forget texts."})
    output: str = field(metadata={"help": "The .jsonl file to write."})
    model: str = field(default="smollm2-135m-instruct", metadata={"help": "Hub id, folder or .gguf file."})
    dtype: str = field(default="float32", metadata={"help": "Data type of the weights."})
    column: str = field(default="text", metadata={"help": "Column of the prompts."})


def main() -> None:
    help_at_once(SynthesizeArguments, "elm_trainer.SynthesisConfig")
    hush_libraries()
    from trl import TrlParser

    from elm_trainer import SynthesisConfig, load_concept, load_model_and_tokenizer, load_texts, synthesize_completions
    from elm_trainer.evaluation.report import model_fingerprint
    from elm_trainer.files import write_text

    arguments, config = TrlParser((SynthesizeArguments, SynthesisConfig)).parse_args_and_config()
    concept = load_concept(arguments.concept)
    prompts = load_texts(arguments.prompts, column=arguments.column)["text"][:]
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)

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
    rows = ({"prompt": prompt, "completion": completion} for prompt, completion in result.pairs)
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
