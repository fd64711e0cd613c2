"""Find the layer at which a model reads a fact out, for `state_layers` and `lora_layers`: `python examples/readout.py`.

In the reference, what a layer gives behind the name that a text is about is replaced by what it gives for other names (the counterfactual
novices). As long as the fact still sits at the name, the model answers as before; once it has moved, the model answers as a novice. A row
a layer: the mean log-probability, in nats, of the text's own token where expert and novice differ most.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from elm_trainer.scripts import hush_libraries


@dataclass
class ReadoutArguments:
    model: str = field(default="smollm2-135m-instruct", metadata={"help": "Model."})
    forget: str = field(default="capitals", metadata={"help": "Built-in texts with counterfactual novices."})
    rows: int = field(default=48, metadata={"help": "Texts that are looked at."})


def main() -> None:
    [arguments] = HfArgumentParser(ReadoutArguments).parse_args_into_dataclasses()
    hush_libraries()
    # After the options are read, so that --help need not wait for torch.
    import torch
    from rich.console import Console

    from elm_trainer import load_texts
    from elm_trainer.data.collator import align
    from elm_trainer.data.tokens import text_ids
    from elm_trainer.modeling import decoder_layers, load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(arguments.model)
    model.eval()
    layers = decoder_layers(model)

    @torch.no_grad()
    def run(
        ids: list[int], replaced: torch.Tensor | None = None, places: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, `[seq, vocab]`, and what each layer gives, `[layers, seq, hidden]`.

        With states `[layers, places, hidden]` put in at these places, each in a run of its own: the log-probabilities of the
        runs, `[layers, seq, vocab]`, and nothing.
        """
        given: list[torch.Tensor] = []

        def hook(_, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if replaced is None:
                given.append(hidden[0].clone())
            else:
                hidden[len(given), places] = replaced[len(given)]
                given.append(hidden.new_empty(0))

        handles = [part.register_forward_hook(hook) for part in layers]
        tokens = torch.tensor([ids]) if replaced is None else torch.tensor([ids]).expand(len(layers), -1)
        logs = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
        for handle in handles:
            handle.remove()
        return (logs[0] if replaced is None else logs), torch.stack(given)

    found, total, count = torch.zeros(len(layers)), torch.zeros(2), 0
    for row in load_texts(arguments.forget, processing_class=tokenizer):
        ids = text_ids(tokenizer, row["text"])
        novices = [text_ids(tokenizer, text) for text in row["novices"]]
        # The first place that they share is the last token of the name itself.
        aligned = align(ids, novices)[1:]
        if not aligned:
            continue
        places = [own for own, *_ in aligned]
        expert, _ = run(ids)
        others = [run(novice) for novice in novices]
        index = [[place[1 + draw] for place in aligned] for draw in range(len(novices))]
        novice = torch.stack([logs[at].exp() for (logs, _), at in zip(others, index, strict=True)]).mean(0).log()
        apart = (expert[places].exp() * (expert[places] - novice)).sum(-1)
        best = int(apart.argmax())
        place = places[best]
        if place + 1 == len(ids):
            continue
        token = ids[place + 1]
        # [layers, places, hidden]
        states = torch.stack([given[:, at] for (_, given), at in zip(others, index, strict=True)]).mean(0)
        total += torch.stack([expert[place, token], novice[best, token]])
        found += run(ids, states, places)[0][:, place, token]
        count += 1
        if count == arguments.rows:
            break
    expert, novice = (total / count).tolist()
    console = Console(highlight=False)
    console.print(f"{count} texts: {expert:.2f} by the expert, {novice:.2f} by the novice")
    for layer, value in enumerate((found / count).tolist()):
        moved = (value - expert) / (novice - expert)
        console.print(f"layer {layer:2d}  {value:6.2f}  {moved:5.2f} of the way to the novice")


if __name__ == "__main__":
    main()
