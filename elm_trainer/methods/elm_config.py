"""`ElmConfig`: the settings of ELM, and which targets, layers and novices they ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset

from ..concept import Concept, load_concept
from ..data.target_store import Field, TargetLayout
from .config import ErasureConfig


# What the paper reports and what its released code does (docs/papers.md). A field that is left out takes its preset's value.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"eta": 500.0, "eta_end": 500.0, "tau": 1.0, "top_k": 50, "retain_loss": "kl"},
    "released": {"eta": 1.0, "eta_end": 1000.0, "tau": 1.2, "top_k": 50, "retain_loss": "argmax"},
}


@dataclass
class ElmConfig(ErasureConfig):
    r"""
    Configuration class for the [`ElmTrainer`]: its parameters beside those of [`~trl.SFTConfig`].

    Parameters:
        preset (`str`, *optional*, defaults to `"paper"`): `"paper"` or `"released"`: where the values of the five
            fields below that are left out come from.
        eta (`float`, *optional*): Strength η of the erasure: `t = b − η·(e − n)`. With the ramp, η of the prediction
            behind a text's first token.
        eta_end (`float`, *optional*): η of the prediction behind a text's last token; η is linear in between. Defaults
            to `eta` where only that is given.
        tau (`float`, *optional*): Temperature τ of the target.
        top_k (`int`, *optional*): Tokens of the target kept per position, and of the reference in the retain term.
        retain_loss (`str`, *optional*): `"kl"` to the reference; `"argmax"`: cross-entropy with the reference's most
            probable token; `"log"`: KL and half the variance of the change of log-probabilities over the vocabulary
            ([`log_space_divergence`]), which keeps the ranking of improbable tokens too; or `"states"`: [`state_loss`] to
            the reference at `state_layers`, with the scale of the state term, which reads no logits and holds prompts too. A
            stored target of `"log"` is `hidden` numbers a position, and one of `"states"` `layers·hidden`.
        faithful (`bool`, *optional*, defaults to `False`): Do what the released code does beside the objective: supervise
            in the retain term also the position behind a text's last token, leave the first token of a completion out of
            the consistency term, and draw the expert and the novice context of a row each by itself, not in pairs.
        plausibility (`float`, *optional*, defaults to `0.0`): Drop tokens less probable than this share of the most
            probable one under reference and novice. `0` gives the paper's target.
        fact_share (`float`, *optional*, defaults to `0.0`): Share of the erase term's weight that goes to positions in
            proportion to `KL(expert ‖ novice)`. `0` weighs all positions alike.
        novice (`str`, *optional*, defaults to `"contexts"`): What the novice is: `"contexts"`, the reference behind a
            novice context (and the expert behind an expert context), as in the paper; or `"counterfactual"`, the
            reference on the same text with the concept's own terms replaced (column `novices` of
            [`build_erasure_dataset`]), its mean probabilities over the draws at the positions that all of them share
            with the text. The expert is then the reference itself.
        log_tokens (`int`, *optional*, defaults to `0`): Take the equation of the erase term in log space, at so many
            tokens of largest `e − n` a position ([`log_space_target`]), and hold all other tokens to the reference's
            odds, the improbable ones too ([`log_space_divergence`]). Then `tau` and `top_k` have no part in the erase
            term. `0` gives the paper's loss.
        log_strength (`float`, *optional*, defaults to `2.0`): Weight of those tokens ([`log_space_loss`]) beside all
            others in the erase term.
        log_others (`str`, *optional*, defaults to `"reference"`): Whose odds all other tokens are held to: the `"reference"`'s, which
            goes on as it would if it did not say what is erased; or the `"novice"`'s, in its first draw, which says something of
            the same kind, by KL alone, since ranks among what it holds improbable tell of another subject. For counterfactual novices.
        log_retain (`float`, *optional*, defaults to `0.0`): With `retain_loss="states"`, weight within the retain term of
            [`log_space_divergence`] to the reference, in steps that have an erase term: what these do to other answers is small
            in states too, but ranks them.
        state_weight (`float`, *optional*, defaults to `0.0`): Weight of the state term: on forget text, layers are to
            give what they give the counterfactual novice ([`state_loss`]). It reads no logits. With `erase_weight=0` it
            stands in place of the erase term, whose weights of positions it takes.
        state_eta (`float`, *optional*, defaults to `1.0`): η of the state term, whose target is `e − η·(e − n)`: 1 is the
            novice itself, and more goes beyond it in the same direction, since training stays short of its target.
        state_names (`bool`, *optional*, defaults to `False`): Whether the replaced names' own states are led too, at their last
            token, so that the names themselves become unknown words: for a concept that its names are, such as the organs of the
            human body, not for what is told of them, such as the capitals of countries, of which other things are to stay.
        state_layers (`list[int]`, *optional*): Layers of the state term, from 0, rising. By default four of the upper
            third, the last among them ([`default_state_layers`]).
        contrast_rows (`int`, *optional*, defaults to `0`): Rows on which the adapter's input directions are chosen
            before training ([`contrast_adapter`]): those that are strong on forget text and weak on retain text. They
            are then kept, so that only LoRA's B is trained, and the adapter can hardly answer to anything else. `0`
            leaves PEFT's random directions, which are trained.
        contrast_damping (`float`, *optional*, defaults to `0.1`): Share of the mean variance on retain text that is
            added in every direction there, so that directions that are rare in both do not win.
        erase_weight (`float`, *optional*, defaults to `1.0`): Weight of the erase term. A weight of 0 skips a term's
            work altogether.
        erase_after (`float`, *optional*, defaults to `0.0`): Share of the steps after which the erase term takes the place of the state
            term. Up to there no step reads logits, so that most of what is forgotten costs little; from there on the erase term
            takes back what is left too faint for the state term, but ranks answers.
        retain_weight (`float`, *optional*, defaults to `1.0`): Weight of the retain term.
        retain_focus (`float`, *optional*, defaults to `0.0`): Share of the retain term's weight that goes to the
            positions of a text in proportion to how far they have moved from the reference, so that answers are not
            lost among the words around them. `0` weighs all alike.
        consistency_weight (`float`, *optional*, defaults to `1.0`): Weight of the consistency term; without synthetic
            pairs in the dataset there is none.
        concepts (`list[str]`, *optional*): Presets or YAML files of the concepts, matched with the column `concept` by
            name. Defaults to what that column names, with the keywords of the column `keywords` where there is one
            ([`Concept`] in [`build_erasure_dataset`]).
        contexts_per_sample (`int`, *optional*, defaults to `1`): Expert and novice contexts drawn per forget text;
            their log-probabilities are averaged.
        expert_steps (`int`, *optional*, defaults to `0`): Steps for which a throw-away expert adapter is fine-tuned on
            the forget texts, in place of the expert contexts. `0` uses contexts.
        novice_steps (`int`, *optional*, defaults to `0`): The same for a novice adapter on the column `novice` (the
            texts with permuted facts). With `0`, an expert adapter is compared with the reference itself.
        teacher_learning_rate (`float`, *optional*, defaults to `1e-3`): Learning rate of the two throw-away adapters,
            decaying to 0.
        teacher_rank (`int`, *optional*, defaults to `16`): Rank of the two throw-away adapters.
        teacher_batch_size (`int`, *optional*, defaults to `8`): Texts per step of the two throw-away adapters.
        precompute_targets (`bool`, *optional*): Compute all targets once before training and keep them on disk for
            every run with the same model, data and settings, so that a step needs no reference forward. By default
            this is done where training visits every row at least once, and they fit into half of the free disk and 64
            GiB. Implied by `expert_steps`.
        target_dtype (`str`, *optional*): `"float32"` computes targets with the whole reference in float32: its weights and
            buffers are cast for as long as targets are made (twice the bytes of bfloat16) and cast back, which loses
            nothing, without autocast, and flash attention, which has no float32, gives way to `sdpa`. States that are
            kept or read in the step (`log_tokens`, `retain_loss="log"`) are rounded to 16 bits all the same. Implies
            `precompute_targets`, unless that is `False`: then all weights are cast in every step. By default it is the
            model's own type; the softmax and what follows it are in float32 in any case.
        keep_states (`bool`, *optional*): Whether what the frozen layers below the first trained one give for a text is kept on
            the model's device from the first time on, so that they run once for each text: 2·hidden bytes a token in 16
            bits. By default up to 1 GiB of it, where texts are read more than once and no term reads logits.
        targets_dir (`str`, *optional*): Folder in which targets are kept, each set of them under a name that says all
            they depend on. All processes must see it. Defaults to `elm_targets` in the cache of `datasets`.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `5e-5` instead of `2e-5`.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "The initial learning rate for AdamW."})

    preset: str = field(
        default="paper", metadata={"help": "Where left-out fields come from.", "choices": sorted(PRESETS)}
    )
    eta: float | None = field(default=None, metadata={"help": "Strength of the erasure (of the first token)."})
    eta_end: float | None = field(default=None, metadata={"help": "Strength of the erasure of the last token."})
    tau: float | None = field(default=None, metadata={"help": "Temperature of the target."})
    top_k: int | None = field(default=None, metadata={"help": "Tokens of the target kept per position."})
    retain_loss: str | None = field(
        default=None, metadata={"help": "Retain term.", "choices": ["kl", "argmax", "log", "states"]}
    )
    faithful: bool = field(default=False, metadata={"help": "Repeat the quirks of the released code."})
    plausibility: float = field(default=0.0, metadata={"help": "Plausibility constraint; 0 switches it off."})
    fact_share: float = field(default=0.0, metadata={"help": "Share of weight by KL(expert, novice)."})
    novice: str = field(
        default="contexts", metadata={"help": "What the novice is.", "choices": ["contexts", "counterfactual"]}
    )
    log_tokens: int = field(default=0, metadata={"help": "Tokens matched in log space; 0 gives the paper's loss."})
    log_strength: float = field(default=2.0, metadata={"help": "Weight of those tokens."})
    log_others: str = field(
        default="reference", metadata={"help": "Whose odds other tokens have.", "choices": ["reference", "novice"]}
    )
    log_retain: float = field(default=0.0, metadata={"help": "Weight of log space in a retain term of states."})
    state_weight: float = field(default=0.0, metadata={"help": "Weight of the state term."})
    state_eta: float = field(default=1.0, metadata={"help": "Strength of the state term; 1 is the novice."})
    state_names: bool = field(default=False, metadata={"help": "Whether the names' own states are led too."})
    state_layers: list[int] | None = field(default=None, metadata={"help": "Layers of the state term."})
    contrast_rows: int = field(default=0, metadata={"help": "Rows that choose the adapter's directions; 0 for none."})
    contrast_damping: float = field(default=0.1, metadata={"help": "Damping of the choice of directions."})
    erase_weight: float = field(default=1.0, metadata={"help": "Weight of the erase term."})
    erase_after: float = field(default=0.0, metadata={"help": "Share of the steps without the erase term."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term."})
    retain_focus: float = field(default=0.0, metadata={"help": "Share of weight by how far a position has moved."})
    consistency_weight: float = field(default=1.0, metadata={"help": "Weight of the consistency term."})
    concepts: list[str] | None = field(default=None, metadata={"help": "Presets or YAML files of the concepts."})
    contexts_per_sample: int = field(default=1, metadata={"help": "Contexts drawn per forget text."})
    expert_steps: int = field(default=0, metadata={"help": "Steps of the throw-away expert adapter."})
    novice_steps: int = field(default=0, metadata={"help": "Steps of the throw-away novice adapter."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the adapters above."})
    teacher_rank: int = field(default=16, metadata={"help": "Rank of the adapters above."})
    teacher_batch_size: int = field(default=8, metadata={"help": "Texts per step of the adapters above."})
    precompute_targets: bool | None = field(default=None, metadata={"help": "Compute all targets before training."})
    target_dtype: str | None = field(default=None, metadata={"help": "float32, or the model's own type."})
    keep_states: bool | None = field(default=None, metadata={"help": "Run frozen layers once for each text."})
    targets_dir: str | None = field(default=None, metadata={"help": "Folder in which targets are kept."})

    _rules = {
        "at least 0": ("eta", "eta_end", "expert_steps", "novice_steps", "log_tokens", "log_retain", "contrast_rows"),
        "above 0": ("tau", "log_strength", "state_eta", "teacher_learning_rate", "contrast_damping"),
        "at least 1": ("top_k", "contexts_per_sample", "teacher_rank", "teacher_batch_size"),
        "from 0 to 1": ("plausibility", "fact_share", "retain_focus", "erase_after"),
    }

    def __post_init__(self):
        if self.eta is not None and self.eta_end is None:
            self.eta_end = self.eta
        preset = PRESETS.get(self.preset, PRESETS["paper"])  # another is refused with all other choices
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if self.target_dtype not in (None, "float32"):
            raise ValueError(
                f'`target_dtype` is {self.target_dtype!r}: use "float32", or leave it out for the model\'s own type.'
            )
        if self.state_weight and self.novice != "counterfactual":
            raise ValueError(
                f"`state_weight` is {self.state_weight} with `novice={self.novice!r}`: states are matched with those of a "
                'counterfactual novice, so set `novice="counterfactual"`, or the weight to 0.'
            )
        if self.retain_loss == "states" and not self.state_weight:
            raise ValueError(
                '`retain_loss` is "states" with `state_weight=0.0`: states are compared by the scale of the state term, so '
                "give that a weight, or choose another loss."
            )
        if self.erase_after and not (self.state_weight and self.erase_weight):
            raise ValueError(
                f"`erase_after` is {self.erase_after} with `state_weight={self.state_weight}` and "
                f"`erase_weight={self.erase_weight}`: it says when the erase term takes the place of the state term, so give "
                "both a weight, or leave it out."
            )
        if self.state_names and not self.state_weight:
            raise ValueError(
                "`state_names` is True with `state_weight=0.0`, which leads no states: give that a weight."
            )
        if self.novice_steps and not self.expert_steps:
            raise ValueError(
                f"`novice_steps` is {self.novice_steps} without an expert adapter: set `expert_steps` too."
            )
        if self.log_tokens and self.tau != 1:
            raise ValueError(
                f"`tau` is {self.tau} with `log_tokens={self.log_tokens}`, which keeps the odds of all other tokens as they "
                "are: set one of the two to its default."
            )
        if self.log_others == "novice" and not (self.log_tokens and self.novice == "counterfactual"):
            raise ValueError(
                f'`log_others` is "novice" with `log_tokens={self.log_tokens}` and `novice={self.novice!r}`: it is for the equation in '
                'log space and counterfactual novices, so set `log_tokens` and `novice="counterfactual"`, or leave it out.'
            )
        if self.log_retain and not (self.retain_loss == "states" and self.retain_weight and self.erase_weight):
            raise ValueError(
                f"`log_retain` is {self.log_retain} with `retain_loss={self.retain_loss!r}`, `retain_weight={self.retain_weight}` and "
                f"`erase_weight={self.erase_weight}`: it adds log space to a retain term of states in steps with an erase term, so set "
                '`retain_loss="states"` and both weights, or leave it out (`retain_loss="log"` is log space alone).'
            )
        if self.log_tokens and self.plausibility:
            raise ValueError(
                f"`plausibility` is {self.plausibility} with `log_tokens={self.log_tokens}`, which keeps the odds of all "
                "other tokens and drops none: set one of the two to 0."
            )
        if self.novice == "counterfactual" and self.expert_steps:
            raise ValueError(
                f'`expert_steps` is {self.expert_steps} with `novice="counterfactual"`, whose expert is the reference: set '
                "it to 0."
            )
        if self.expert_steps or (self.target_dtype and self.precompute_targets is None):
            self.precompute_targets = True


class StoredTargets(NamedTuple):
    """What is kept of ELM's targets, and the settings and columns of the tokenized dataset that it depends on."""

    layout: TargetLayout
    settings: dict[str, Any]
    columns: list[str]


def stored_targets(
    args: ElmConfig, vocab_size: int, hidden_size: int, state_layers: Sequence[int] = ()
) -> StoredTargets:
    """What a run with this config keeps for a model of these sizes, with the layers of its state term."""
    kept: dict[str, Field] = {}
    columns: list[str] = []
    names = ["eta", "eta_end", "tau", "top_k", "plausibility", "fact_share", "retain_loss", "novice", "log_tokens"]
    more: dict[str, Any] = {}
    if args.erase_weight or args.state_weight:
        columns += ["concept", "forget_ids", *(["novice_ids"] if args.novice_steps else [])]
        columns += ["novices_ids"] if args.novice == "counterfactual" else []
        kept["forget_weights"] = Field("floats")
        if args.state_weight:
            kept["forget_novice_states"] = Field("states", len(state_layers) * hidden_size)
            more |= {"state_layers": [*state_layers], "state_eta": args.state_eta}
        if not args.erase_weight:
            more["erase_weight"] = 0.0
        elif args.log_tokens:
            kept["forget_states"] = Field("states", hidden_size)
            kept["forget_indices"] = Field("ids", args.log_tokens)
            kept["forget_log_probs"] = Field("floats", args.log_tokens)
            more |= {"log_others": "novice"} if args.log_others == "novice" else {}
        else:
            kept |= {"forget_indices": Field("ids", args.top_k), "forget_probs": Field("probs", args.top_k)}
        if args.expert_steps:
            names += ["expert_steps", "novice_steps", "teacher_learning_rate", "teacher_rank", "teacher_batch_size"]
            names += ["seed"]
    if args.retain_weight:
        columns += ["retain_ids", "retain_start"]
        if args.retain_loss == "states":
            kept["retain_layer_states"] = Field("states", len(state_layers) * hidden_size)
            kept |= {"retain_states": Field("states", hidden_size)} if args.log_retain else {}
        elif args.retain_loss == "log":
            kept["retain_states"] = Field("states", hidden_size)
        else:
            top_k = 1 if args.retain_loss == "argmax" else args.top_k
            kept |= {"retain_indices": Field("ids", top_k), "retain_probs": Field("probs", top_k)}
        more |= {"faithful": True} if args.faithful else {}
    more |= {"target_dtype": args.target_dtype} if args.target_dtype else {}
    # The version is that of what is made from the settings.
    settings = {"method": "ELM", "version": 3, **{name: getattr(args, name) for name in names}, **more}
    return StoredTargets(TargetLayout(kept, vocab_size), settings, columns)


def term_weights(args: ElmConfig) -> dict[str, float]:
    """The weight of each term."""
    return {term: getattr(args, f"{term}_weight") for term in ("erase", "state", "retain", "consistency")}


def batch_weights(args: ElmConfig) -> dict[str, float]:
    """The weights by sub-batch: the state term reads that of the erase term."""
    erase = max(args.erase_weight, args.state_weight)
    return {"erase": erase, "retain": args.retain_weight, "consistency": args.consistency_weight}


def always_erases(args: ElmConfig) -> bool:
    """Whether every step has an erase term, not only the last ones or none."""
    return args.erase_weight > 0 and not args.erase_after


def is_counterfactual(args: ElmConfig) -> bool:
    """Whether forget texts are compared with counterfactual novices."""
    return args.novice == "counterfactual" and max(args.erase_weight, args.state_weight) > 0


def default_state_layers(depth: int) -> list[int]:
    """Four layers of the upper third, the last among them: for 30 layers 20, 24, 27 and 29."""
    return sorted({min(depth - 1, round(depth * share)) for share in (2 / 3, 0.8, 0.9)} | {depth - 1})


def chosen_state_layers(given: Sequence[int] | None, depth: int) -> list[int]:
    """The layers of the state term: those that are given, or else [`default_state_layers`].

    Raises `ValueError` unless they are some of a model's, each once and rising.
    """
    layers = list(given or default_state_layers(depth))
    if layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
        raise ValueError(
            f"`state_layers` is {layers}, but the model has the layers 0 to {depth - 1}: name some of them, each once "
            "and in rising order."
        )
    return layers


def check_novices(datasets: Mapping[str, Dataset]) -> None:
    """Raise `ValueError` unless every row has counterfactual novices, and all rows of a dataset as many."""
    for name, dataset in datasets.items():
        if "aligned" in dataset.column_names:
            continue
        counts = {len(novices) for novices in dataset["novices"]} if "novices" in dataset.column_names else {0}
        if counts != {max(counts)} or counts == {0}:
            raise ValueError(
                f'`{name}` has rows with {sorted(counts)} `novices`, but `novice="counterfactual"` needs as many for every '
                "forget text: make them with `counterfactuals`, or use the contexts."
            )


def named_concepts(args: ElmConfig, datasets: Mapping[str, Dataset]) -> dict[str, Concept]:
    """The concept of each name that stands in a dataset."""
    described: dict[str, str] = {}
    for dataset in datasets.values():
        if "concept" in dataset.column_names:
            described |= dict.fromkeys(set(dataset.unique("concept")) - set(described), "")
        if "keywords" in dataset.column_names:
            described |= {c: words for c, words in zip(dataset["concept"], dataset["keywords"], strict=True) if words}
    given: list[str | Concept] = [*(args.concepts or ())]
    given = given or [Concept(name, [words]) if words else name for name, words in sorted(described.items())]
    concepts = {concept.name: concept for concept in map(load_concept, given)}
    if missing := set(described) - set(concepts):
        raise ValueError(f"`concepts` is {args.concepts}, but the dataset also names {sorted(missing)}: add them.")
    return concepts
