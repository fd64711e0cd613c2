"""Find the layer at which a model reads a fact out, as `lora_layers: auto` does: `python examples/readout.py`.

A row a layer: how far of the way to the counterfactual novice the model answers where what the layer gives behind the name is the
novice's ([`find_readout`]).
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from elm_trainer.cli import hush_libraries


@dataclass
class ReadoutArguments:
    model: str = field(default="smollm2-135m-instruct", metadata={"help": "Model."})
    forget: str = field(
        default="capitals", metadata={"help": "Texts with counterfactual novices: built-in, or a file."}
    )
    texts: int = field(default=24, metadata={"help": "Texts that are looked at."})
    threshold: float = field(default=0.8, metadata={"help": "Share of the way that a layer has to take."})


def main() -> None:
    [arguments] = HfArgumentParser(ReadoutArguments).parse_args_into_dataclasses()
    hush_libraries()
    # After the options are read, so that --help need not wait for torch.
    from rich.console import Console

    from elm_trainer import find_readout, load_model_and_tokenizer, load_texts

    model, tokenizer = load_model_and_tokenizer(arguments.model)
    rows = load_texts(arguments.forget, processing_class=tokenizer)
    found = find_readout(model, rows, tokenizer, texts=arguments.texts, threshold=arguments.threshold)
    console = Console(highlight=False)
    console.print(f"{found.texts} texts: {found.expert:.2f} by the expert, {found.novice:.2f} by the novice")
    for layer, share in enumerate(found.shares):
        console.print(f"layer {layer:2d}  {share:5.2f} of the way to the novice")
    told = f"lora_layers {found.lora_layers}, state_layers {found.layers[-1:]}: {found.reason}."
    console.print(told, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
