"""Memory and time of an ELM step as formulas of the model's sizes: `python -m benchmarks.prediction` fills docs/scale.md.

The formulas count what a step with stored targets does: frozen layers below the first adapted one run forward only; from
there on every layer runs forward and passes gradients back; the adapter's matrices also get gradients of their own; the
LM head runs on supervised positions, a chunk at a time.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from elm_trainer.cli.erase_options import erasure_line
from elm_trainer.cli.recipes import recipe_names
from elm_trainer.fitting import empty_model
from elm_trainer.head import ACCELERATOR_CHUNK
from elm_trainer.modeling import layer_range

from .gpu import page_table
from .shapes import Adapter, ModelShape


# Matrices that read what another one does.
SHARES = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class StepShape:
    """What a forward and backward pass is made of."""

    tokens: int  # of all texts
    positions: int  # whose prediction is supervised
    text: int  # tokens that attend to each other: of a text, or of the row that it is packed into
    weight_bytes: float = 2  # of a frozen weight
    bytes: int = 2  # of an activation
    mask_bytes: int = 1  # that dropout keeps for an element; on a CPU as many as the element itself has
    checkpointing: bool = False  # whether layers are computed again in the backward pass
    chunk: int = ACCELERATOR_CHUNK  # logits that are made at a time; by default as on a GPU of 16 GB and more


@dataclass(frozen=True)
class Device:
    """What a device can do. All of it is given, not predicted."""

    flops: float  # floating-point operations per second that matrix products reach
    bandwidth: float  # bytes per second to and from its memory
    memory: float = 0  # bytes it holds
    link: float = float("inf")  # bytes per second to other devices


@dataclass(frozen=True)
class Memory:
    """Bytes on a device at the peak of a step, by what they hold."""

    weights: float  # frozen ones
    adapter: float  # in float32, its gradient and Adam's two moments: 16 bytes to a weight
    activations: float  # what the forward pass keeps for the backward pass
    # Gradients of a layer's activations while it is passed through, and weights gathered from other devices.
    working: float
    head: float  # logits of a chunk of positions, and the final states with their gradients

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.activations + self.working + self.head

    @property
    def added(self) -> float:
        """What a step adds to a model and its adapter that are there already."""
        return self.total - self.weights - self.adapter / 4


def layers_with_gradient(shape: ModelShape, adapter: Adapter) -> int:
    """Layers from the first adapted one on."""
    return shape.layers - min(adapter.layers)


def kept_bytes(shape: ModelShape, adapter: Adapter | None, step: StepShape) -> float:
    """Bytes that one layer keeps of a token for the backward pass.

    A layer without adapter: the input of both norms (in float32); queries, keys and values, and attention's output; in the
    feed-forward part the gate before and after its activation, and what it gates. A frozen matrix keeps nothing. Every
    adapted matrix besides keeps its input (with dropout: the dropped input and the mask) and the `rank` numbers between
    its two factors.
    """
    h, i = shape.hidden, shape.intermediate
    kept = 2 * h * 4 + (2 * shape.q_width + 2 * shape.kv_width + 3 * i) * step.bytes
    if adapter is None:
        return kept
    inputs = [shape.projections[name][0] for name in adapter.targets]
    if adapter.dropout:
        kept += sum(inputs) * (step.bytes + step.mask_bytes)
    else:
        # Queries, keys and values share their input, and so do the two matrices of the gate.
        shared = {SHARES.get(name, name): shape.projections[name][0] for name in adapter.targets}
        kept += sum(shared.values()) * step.bytes
    return kept + len(inputs) * adapter.rank * step.bytes


def memory(shape: ModelShape, adapter: Adapter, step: StepShape, devices: int = 1, sharded: bool = False) -> Memory:
    """Bytes on each device at the peak of a step of its own texts, which comes where the backward pass begins.

    If `sharded`, weights, adapter and optimizer are cut over the devices (FSDP2, ZeRO-3), in place of a whole copy on each (DDP).
    """
    share = devices if sharded else 1
    layers = layers_with_gradient(shape, adapter)
    plain, adapted = (kept_bytes(shape, which, step) for which in (None, adapter))
    kept: float
    if step.checkpointing:
        # Every layer keeps its input, and the one that is computed again keeps all.
        kept = layers * shape.hidden * step.bytes + adapted
    else:
        kept = (layers - len(adapter.layers)) * plain + len(adapter.layers) * adapted
    working: float = step.tokens * (2 * shape.hidden + 3 * shape.intermediate) * step.bytes
    if sharded:
        # A layer in use and the next one on its way, or the embeddings, whichever is larger.
        gathered = max(2 * shape.layer_parameters, shape.vocab * shape.hidden)
        working += gathered * step.weight_bytes
    # Logits of a chunk in the model's type and in float32, their gradient, and the soft-max on the way to it.
    chunk = min(step.chunk, step.positions * shape.vocab) * (step.bytes + 3 * 4)
    return Memory(
        weights=shape.parameters * step.weight_bytes / share,
        adapter=16 * adapter.parameters(shape) / share,
        activations=step.tokens * kept,
        working=working,
        head=chunk + 3 * step.positions * shape.hidden * step.bytes,
    )


def step_flops(shape: ModelShape, adapter: Adapter, step: StepShape) -> float:
    """Floating-point operations of a forward and backward pass; a multiplication with its addition counts as two.

    Per token: `2·N` forward for all matrices, `2·N` back for those from the first adapted layer on, `6·A` for the
    adapter (forward, input's gradient, own gradient); attention `4·text·hidden` per layer forward and twice that back.
    Per supervised position: `4·hidden·vocab` for the head, forward and back.
    """
    layers = layers_with_gradient(shape, adapter)
    forward, back = shape.layers, layers
    if step.checkpointing:
        forward += layers
    matrices = 2 * shape.layer_parameters * (forward + back)
    attention = 4 * step.text * shape.q_width * (forward + 2 * back)
    own = (8 if step.checkpointing else 6) * adapter.parameters(shape)
    return step.tokens * (matrices + attention + own) + step.positions * 4 * shape.hidden * shape.vocab


def moved_bytes(shape: ModelShape, adapter: Adapter, step: StepShape) -> float:
    """Bytes that go through memory for everything but matrix products.

    Norms, rotary positions, gates, residual sums and the adapter's sums and dropout read and write their operands: about
    `24·hidden + 5·intermediate` numbers a token and layer forward, twice that back. Adam reads and writes seven numbers a
    weight of the adapter. Of logits, eight passes are made: the normalizer, the gathered tokens, and the gradient.
    """
    layers = layers_with_gradient(shape, adapter)
    forward = shape.layers + (layers if step.checkpointing else 0)
    elements = 24 * shape.hidden + 5 * shape.intermediate
    moved = step.tokens * elements * (forward + 2 * layers) * step.bytes
    inputs, outputs = (sum(shape.projections[name][side] for name in adapter.targets) for side in (0, 1))
    own = step.tokens * len(adapter.layers) * (9 * outputs + (9 * inputs if adapter.dropout else 0)) * step.bytes
    logits = 8 * 4 * step.positions * shape.vocab
    return moved + own + logits + 28 * adapter.parameters(shape)


def step_seconds(
    shape: ModelShape, adapter: Adapter, step: StepShape, device: Device, devices: int = 1, sharded: bool = False
) -> float:
    """Seconds of a step: matrix products and traffic to memory one after the other, or what is sent between devices.

    What is sent overlaps with computing, so the longer of the two counts. Whole copies send the adapter's gradients;
    cut weights are gathered once forward and once back.
    """
    computing = step_flops(shape, adapter, step) / device.flops + moved_bytes(shape, adapter, step) / device.bandwidth
    if sharded:
        frozen_below = min(adapter.layers) * shape.layer_parameters
        sent = (2 * shape.parameters - frozen_below) * step.weight_bytes + 12 * adapter.parameters(shape)
    else:
        sent = 8 * adapter.parameters(shape)
    return max(computing, sent * (devices - 1) / devices / device.link)


def target_bytes(top_k: int, retain_kl: bool, vocab: int) -> tuple[int, int]:
    """Bytes of stored targets per supervised token, of forget text and of retain text.

    A token of a target takes an index of 2 bytes (3 where the vocabulary is larger than 65,536) and a probability of 3;
    each position of forget text also has a weight of 4 bytes. With `retain_kl`, the retain term keeps a distribution too, not the most
    probable token alone.
    """
    entry = (2 if vocab <= 2**16 else 3) + 3
    return top_k * entry + 4, (top_k if retain_kl else 1) * entry


MODELS = {
    "7B": ModelShape(4096, 14336, 32, 32, 8, 32_000, tied=False),
    "70B": ModelShape(8192, 28672, 80, 64, 8, 128_256, tied=False),
}
# As released; on the larger model at the same depth.
ADAPTERS = {"7B": Adapter(256, tuple(range(4, 8))), "70B": Adapter(256, tuple(range(10, 18)))}
# Given, not predicted: 989 TFLOP/s of bf16 on the data sheet, of which 40 % are reached; 3.35 TB/s, 80 GB; NVLink 450 GB/s
# each way.
H100 = Device(flops=0.4 * 989e12, bandwidth=3.35e12, memory=80e9, link=450e9)
# Eight samples of three texts of 256 tokens on each device.
SAMPLES, TEXT = 8, 256
# Of a device's memory, what torch's allocator and the libraries leave.
USABLE = 0.9
BITS4 = 0.52  # bytes of a weight in 4 bits, its scales included
LAYOUTS = (
    ("1 GPU", 1, False, 2.0), ("1 GPU, 4-bit base", 1, False, BITS4), ("8 GPUs, DDP", 8, False, 2.0),
    ("8 GPUs, FSDP2 or ZeRO-3", 8, True, 2.0),
)  # fmt: skip


def table() -> str:
    """Predictions for 7B and 70B as a table in Markdown."""
    lines = [
        "| model | devices | weights | adapter, optimizer | activations | head, working | total of 80 GB | checkpointing "
        "| s a step | samples a second |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, shape in MODELS.items():
        for layout, devices, sharded, weight_bytes in LAYOUTS:
            lines.append(_row(name, shape, layout, devices, sharded, weight_bytes))
    return "\n".join(lines)


def fitting(shape: ModelShape, adapter: Adapter, step: StepShape, device: Device, devices: int, sharded: bool):
    """The step without checkpointing where that fits a device, else with it; and whether it fits then."""
    for checkpointing in (False, True):
        chosen = replace(step, checkpointing=checkpointing)
        if memory(shape, adapter, chosen, devices, sharded).total <= USABLE * device.memory:
            return chosen, True
    return chosen, False


def _row(name: str, shape: ModelShape, layout: str, devices: int, sharded: bool, weight_bytes: float) -> str:
    adapter = ADAPTERS[name]
    tokens = SAMPLES * 3 * TEXT
    step = StepShape(tokens, tokens - SAMPLES * 3, TEXT, weight_bytes=weight_bytes)
    step, fits = fitting(shape, adapter, step, H100, devices, sharded)
    need = memory(shape, adapter, step, devices, sharded)
    parts = [need.weights, need.adapter, need.activations, need.head + need.working]
    cells = [name, layout, *(f"{part / 1e9:.1f} GB" for part in parts)]
    if not fits:
        return "| " + " | ".join([*cells, f"{need.total / 1e9:.1f} GB: does not fit", "on", "–", "–"]) + " |"
    seconds = step_seconds(shape, adapter, step, H100, devices, sharded)
    cells += [f"{need.total / 1e9:.1f} GB", "on" if step.checkpointing else "off", f"{seconds:.2f}"]
    return "| " + " | ".join([*cells, f"{devices * SAMPLES / seconds:.1f}"]) + " |"


# As above, but for products of float32, of which the data sheet has 67 TFLOP/s.
H100_FLOAT32 = replace(H100, flops=0.4 * 67e12)
ROOT = Path(__file__).resolve().parents[1]


def recipe_table() -> str:
    """Predictions for the recipes of large models as a table in Markdown, with texts of `max_length` tokens each."""
    configs = {path.stem: path for path in sorted((ROOT / "tests" / "recipes" / "configs").glob("*.json"))}
    lines = [
        "| recipe | trained weights | weights | adapter, optimizer | activations | head, working | total of 80 GB "
        "| s an update | updates | training |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, path in configs.items():
        config = AutoConfig.from_pretrained(path)
        weights = empty_model(config).num_parameters()
        shape = ModelShape.of(config.get_text_config())
        recipes = [recipe for recipe in recipe_names() if recipe.startswith(f"{name}-")]
        lines += [_recipe_row(recipe, shape, weights) for recipe in recipes]
    return "\n".join(lines)


def _recipe_row(recipe: str, shape: ModelShape, weights: int) -> str:
    given, args = erasure_line("erase", ["--recipe", recipe, "--use_cpu=true"]).complete()
    layers = tuple(layer_range(given.lora_layers) or range(shape.layers))
    adapter = Adapter(
        given.lora_rank, layers, given.lora_alpha, given.lora_dropout, tuple(given.lora_targets.split(","))
    )
    size = 4 if given.dtype == "float32" else 2
    texts = args.per_device_train_batch_size * (3 if args.consistency_weight else 2)
    tokens = texts * args.max_length
    step = StepShape(
        tokens,
        tokens - texts,
        args.max_length,
        size,
        2 if args.bf16 else size,
        checkpointing=args.activation_checkpointing,
    )
    need = memory(shape, adapter, step)
    # With directions that are chosen, LoRA's A is neither trained nor has it moments.
    outputs = sum(adapter.rank * shape.projections[name][1] for name in adapter.targets) * len(layers)
    trained = outputs if args.contrast_rows else adapter.parameters(shape)
    parts = [
        weights * size,
        16 * trained + 4 * (adapter.parameters(shape) - trained),
        need.activations,
        need.head + need.working,
    ]
    rows = given.dataset_size * sum(given.shares or [1] * len(given.forget)) * args.num_train_epochs
    updates = round(rows / args.per_device_train_batch_size / args.gradient_accumulation_steps)
    device = H100 if args.bf16 else H100_FLOAT32
    seconds = args.gradient_accumulation_steps * step_seconds(shape, adapter, step, device)
    cells = [f"`{recipe}`", f"{trained:,}", *(f"{part / 1e9:.1f} GB" for part in (*parts, sum(parts)))]
    return "| " + " | ".join([*cells, f"{seconds:.2f}", f"{updates:,}", f"{updates * seconds / 60:.0f} min"]) + " |"


PAGE = ROOT / "docs" / "scale.md"
# What `make gpu` wrote, where it is committed.
MEASURED = ROOT / "docs" / "gpu.json"
BEGIN, END = "<!-- {}: python -m benchmarks.prediction -->\n", "\n<!-- end of {} -->"


def with_tables(page: str) -> str:
    """The page with the tables between their marks renewed."""
    tables = {"predictions": table(), "recipes": recipe_table(), "measured": page_table(MEASURED)}
    for name, made in tables.items():
        before, rest = page.split(BEGIN.format(name))
        page = before + BEGIN.format(name) + made + END.format(name) + rest.split(END.format(name))[1]
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
