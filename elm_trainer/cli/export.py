"""Write an erasure for llama.cpp and Ollama, or merged into full weights: `elm export --adapter outputs/demo/adapter --output capitals.gguf`.

`--to gguf-adapter` writes the adapter alone, to be put on any GGUF of its base, however quantized; `--to gguf` the base's GGUF
file with the adapter merged; `--to safetensors` a folder of full weights, as every other server reads it.
"""

from dataclasses import dataclass, field

from .options import CommandLine, check_adapter


FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass
class ExportArguments:
    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    output: str = field(metadata={"help": "The .gguf file to write, or the folder for safetensors."})
    to: str = field(
        default="gguf-adapter",
        metadata={"help": "What is written.", "choices": ["gguf-adapter", "gguf", "safetensors"]},
    )
    type: str | None = field(
        default=None,
        metadata={
            "help": "Type of the weights: f32, f16, bf16 or q8_0; f32 for an adapter, else f16 or that of the base."
        },
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Base, where the adapter names none to be found here."}
    )
    base_file: str | None = field(
        default=None, metadata={"help": "For --to gguf: GGUF file of the base; the one trained on by default."}
    )


def main(argv: list[str] | None = None) -> None:
    line = CommandLine("export", __doc__, argv, own=ExportArguments)
    [arguments] = line.early()
    check_adapter(arguments.adapter)
    if arguments.to != "safetensors" and not arguments.output.endswith(".gguf"):
        line.fail(f"`output` is {arguments.output!r}, but --to {arguments.to} writes a file: let it end in .gguf.")
    if arguments.base_file and arguments.to != "gguf":
        line.fail(f"`base_file` is {arguments.base_file!r}, but only --to gguf merges into a file: leave it out.")
    from . import hush_libraries

    hush_libraries()
    from .. import export_gguf, export_gguf_adapter, load_erased, merge_erased

    dtype = {} if arguments.type is None else {"dtype": arguments.type}
    if arguments.to == "gguf-adapter":
        export_gguf_adapter(arguments.adapter, arguments.output, base_model=arguments.base_model, **dtype)
    elif arguments.to == "gguf":
        export_gguf(arguments.adapter, arguments.output, base_file=arguments.base_file, **dtype)
    else:
        if arguments.type and arguments.type not in FLOATS:
            line.fail(
                f"`type` is {arguments.type!r}, but safetensors are written as {', '.join(FLOATS)}: use one of these."
            )
        wanted = FLOATS[arguments.type] if arguments.type else "auto"
        merge_erased(*load_erased(arguments.adapter, base_model=arguments.base_model, dtype=wanted), arguments.output)
