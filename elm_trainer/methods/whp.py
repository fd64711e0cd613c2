"""Who's Harry Potter (arXiv 2310.02238): config and trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.collator import IGNORE_INDEX, ElmDataCollator
from ..files import json_sha256
from ..head import STATES, Plan
from .anchors import Alignment, AnchorDictionary, align_texts, load_anchors
from .base import ErasureTrainer
from .config import ErasureConfig
from .forward import batch_mean, place_model
from .targets import Teacher


LABELS = "generic_labels"
# A forget text by its concept and its tokens.
TextKey: TypeAlias = tuple[str, tuple[int, ...]]


@dataclass
class WhpConfig(ErasureConfig):
    r"""
    Configuration class for the [`WhpTrainer`]: its parameters beside those of [`~trl.SFTConfig`].

    Parameters:
        anchors (`list[str]`, *optional*): Presets or YAML files of the anchor dictionaries, matched with the column
            `concept` by name. Defaults to the presets the column names.
        alpha (`float`, *optional*, defaults to `5.0`): Strength α of what the reinforced model adds: `v_generic =
            v_baseline − α·ReLU(v_reinforced − v_baseline)`.
        relu (`bool`, *optional*, defaults to `True`): Whether only logits that the reinforced model raises count.
            `False` gives the paper's linear variant.
        erase_weight (`float`, *optional*, defaults to `1.0`): Weight of the erase term. A weight of 0 skips a term's
            work in the step.
        retain_weight (`float`, *optional*, defaults to `0.0`): Weight of the retain term. The paper has none.
        retain_loss (`str`, *optional*, defaults to `"nll"`): `"nll"` of retain text, or `"kl"` to the reference, which
            is then run on it at every step.
        reinforced_steps (`int`, *optional*, defaults to `100`): Steps for which the throw-away reinforced adapter is
            fine-tuned on the forget texts. `0` takes the baseline in its place: the labels come from the translation
            alone.
        teacher_learning_rate (`float`, *optional*, defaults to `1e-3`): Learning rate of the reinforced adapter,
            decaying to 0.
        teacher_rank (`int`, *optional*, defaults to `16`): Rank of the reinforced adapter.
        teacher_batch_size (`int`, *optional*, defaults to `8`): Texts per step of the reinforced adapter.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `1e-4` instead of `2e-5`. The paper trains all weights, with `1e-6`.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})

    anchors: list[str] | None = field(default=None, metadata={"help": "Presets or YAML files of the dictionaries."})
    alpha: float = field(default=5.0, metadata={"help": "Strength of what the reinforced model adds."})
    relu: bool = field(default=True, metadata={"help": "Whether only raised logits count."})
    erase_weight: float = field(default=1.0, metadata={"help": "Weight of the erase term."})
    retain_weight: float = field(default=0.0, metadata={"help": "Weight of the retain term."})
    retain_loss: str = field(default="nll", metadata={"help": "Retain term.", "choices": ["nll", "kl"]})
    reinforced_steps: int = field(default=100, metadata={"help": "Steps of the throw-away reinforced adapter."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the adapter above."})
    teacher_rank: int = field(default=16, metadata={"help": "Rank of the adapter above."})
    teacher_batch_size: int = field(default=8, metadata={"help": "Texts per step of the adapter above."})

    _rules = {
        "at least 0": ("alpha", "reinforced_steps"),
        "above 0": ("teacher_learning_rate",),
        "at least 1": ("teacher_rank", "teacher_batch_size"),
    }


def generic_logits(
    baseline: torch.Tensor, reinforced: torch.Tensor, alpha: float, *, relu: bool = True
) -> torch.Tensor:
    """`v_generic = v_baseline − α·ReLU(v_reinforced − v_baseline)` on raw logits (arXiv 2310.02238, eq. 1).

    Args:
        baseline, reinforced: Logits of the baseline on the translated text, and of the reinforced model on the text itself,
            `[positions, vocab]`.
        relu: `False` leaves the ReLU out: the linear form the paper starts from, which is ELM's target with η=α, the
            baseline as novice and the reinforced model as expert.
    """
    offset = reinforced - baseline
    return baseline - alpha * (offset.relu() if relu else offset)


def generic_labels(
    baseline: torch.Tensor,
    reinforced: torch.Tensor,
    *,
    alpha: float,
    relu: bool = True,
    spent: Sequence[tuple[int, int]] = (),
) -> torch.Tensor:
    """Most probable tokens under [`generic_logits`] (arXiv 2310.02238, §2.4), `[positions]`.

    `spent` are positions and tokens whose baseline logit is lowered to the mean of its position: the translations of
    anchors that were named before (§2.2; the amount is the authors' code's).
    """
    places = torch.tensor(spent, dtype=torch.long, device=baseline.device).reshape(-1, 2)
    baseline = baseline.float()
    baseline = baseline.index_put(tuple(places.T), baseline.mean(-1)[places[:, 0]])
    return generic_logits(baseline, reinforced.float(), alpha, relu=relu).argmax(-1)


@dataclass
class WhpDataCollator(ElmDataCollator):
    """[`ElmDataCollator`] whose forget batch has the generic labels in place of the text's own tokens."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        forget = batch["forget"]
        labels = forget["labels"].fill_(IGNORE_INDEX)
        for index, (example, start) in enumerate(zip(examples, self._starts(forget), strict=True)):
            own = torch.tensor(example[LABELS])
            labels[index, start + 1 : start + 1 + len(own)] = own
        forget["rows"], forget["columns"] = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        return batch

    def pad_at(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
        """Pad rows of `(token ids, positions)` into a batch that yields the logits at those positions."""
        batch = self.pad([(ids, 0) for ids, _ in rows])
        places = [
            (index, start + position)
            for index, ((_, positions), start) in enumerate(zip(rows, self._starts(batch), strict=True))
            for position in positions
        ]
        batch["rows"], batch["columns"] = torch.tensor(places, dtype=torch.long).reshape(-1, 2).unbind(1)
        return batch

    def _starts(self, batch: Mapping[str, Any]) -> list[int]:
        """Column of each row's first token."""
        left = self.processing_class.padding_side == "left"
        return [batch["input_ids"].size(1) - length if left else 0 for length in batch["lengths"]]


class WhpTrainer(ErasureTrainer):
    """Trainer for "Who's Harry Potter" (WHP): fine-tune a model on what it would have said, had it not read the texts.

    Four stages, of which the first three are done here and the last by `train`:

    1. `reinforce`: a throw-away adapter is fine-tuned on the forget texts (§2.1).
    2. [`align_texts`]: the texts are translated by a dictionary of anchored terms and aligned with their translations
       (§2.2).
    3. `label`: the generic labels, [`generic_labels`] of the baseline on the translation and the reinforced model on the
       text (§2.3, eq. 1), stored in the column `generic_labels` of the dataset, one for each token but the first.
    4. `train`: `Loss = λe·erase + λr·retain`, each the mean over texts of the mean over their positions: cross-entropy
       with the generic labels on forget text, and the retain term of [`GradDiffTrainer`], which the paper has not.

    What the paper leaves open is done as in its authors' code: the last token of an anchor, and of a repeated one, gets a
    label; where an anchor was named before, its translation's first tokens are lowered to the mean logit. Otherwise: an
    anchor is repeated when the same term is, a term has one replacement, a text is a block (longer ones are cut to
    `max_length`), and characters, not tokens, are searched and aligned.

    A dataset that already has the column `generic_labels` (the `train_dataset` of another `WhpTrainer` with the same
    tokenizer) is used as it is: the first three stages are skipped.

    Takes the arguments of [`~trl.SFTTrainer`] and raises what [`ErasureTrainer`] and [`align_texts`] raise.

    Args:
        anchors (`Sequence[AnchorDictionary]`, *optional*): Dictionaries in place of those that `args.anchors` names.

    Example:

    ```python
    towns = AnchorDictionary("capitals", {"Oslo": "Millbrook", "Norway": "Westland"})
    trainer = WhpTrainer(
        model, WhpConfig("outputs"), train_dataset=dataset, processing_class=tokenizer, peft_config=LoraConfig(r=32),
        anchors=[towns],
    )
    trainer.train()
    ```
    """

    _name = "WHP"
    _config_class = WhpConfig
    args: WhpConfig
    train_dataset: Dataset
    eval_dataset: Any

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        anchors: Sequence[AnchorDictionary] | None = None,
        **kwargs,
    ):
        self._anchors = anchors
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if alignments := self._alignments:
            reinforced = self.reinforce()
            labels = dict(zip(alignments, self.label(list(alignments.values()), reinforced), strict=True))
            if reinforced is not None:
                reinforced.remove()
            self.train_dataset, self.eval_dataset = (
                {name: _add_labels(part, labels) for name, part in dataset.items()}
                if isinstance(dataset, dict)
                else _add_labels(dataset, labels)
                for dataset in (self.train_dataset, self.eval_dataset)
            )

    def default_collator(self, args, processing_class, datasets):
        return WhpDataCollator(processing_class, pad_to_multiple_of=args.pad_to_multiple_of, seed=args.seed)

    def check_given(self, model, args, datasets, data_collator):
        """Stage 2 is done here, since it shows whether the anchors fit the texts."""
        if not isinstance(data_collator, WhpDataCollator):
            raise TypeError(f"`data_collator` is of type {type(data_collator).__name__}: pass a WhpDataCollator.")
        unlabeled = {name: dataset for name, dataset in datasets.items() if LABELS not in dataset.column_names}
        texts: dict[str, dict[str, None]] = {}
        for name, dataset in unlabeled.items():
            if "forget" not in dataset.column_names:
                raise ValueError(
                    f"`{name}` holds tokens, not texts to find anchors in: pass the one of `build_erasure_dataset`."
                )
            for concept, text in zip(dataset["concept"], dataset["forget"], strict=True):
                texts.setdefault(concept, {})[text] = None  # each distinct one, in order
        dictionaries = _dictionaries(args, self._anchors, sorted(texts))
        self._anchor_terms = {name: dict(dictionary.terms) for name, dictionary in dictionaries.items()}
        self._alignments: dict[TextKey, Alignment] = {
            (name, tuple(alignment.ids)): alignment
            for name, dictionary in dictionaries.items()
            for alignment in align_texts(
                dictionary, list(texts[name]), data_collator.processing_class, args.max_length
            )
        }

    def reinforce(self) -> Teacher | None:
        """Stage 1: fine-tune the reinforced adapter, which stays beside the trained one until its `remove` is called."""
        if not self.args.reinforced_steps:
            return None
        texts = list(self.train_dataset["forget_ids"])
        return Teacher.fit(self, "reinforced", texts, self.args.reinforced_steps)

    def label(self, alignments: Sequence[Alignment], reinforced: Teacher | None) -> list[list[int]]:
        """Stage 3: the generic labels of each text, one for each token but its first; -100 where there is none."""
        labels = [torch.full((max(len(alignment.ids) - 1, 0),), IGNORE_INDEX) for alignment in alignments]
        # Texts of like length run together, so that little is left of the packed rows.
        order = sorted(
            (index for index, alignment in enumerate(alignments) if alignment.positions),
            key=lambda index: -len(alignments[index].ids),
        )
        place_model(self)
        size = self.args.per_device_train_batch_size
        disable = not self.accelerator.is_local_main_process
        for start in tqdm(range(0, len(order), size), desc="Computing generic labels", disable=disable):
            chosen = order[start : start + size]
            texts = [alignments[index] for index in chosen]
            found = self._generic_labels(texts, reinforced).cpu().split([len(text.positions) for text in texts])
            for index, text, own in zip(chosen, texts, found, strict=True):
                labels[index][text.positions] = own
        return [row.tolist() for row in labels]

    def _generic_labels(self, texts: Sequence[Alignment], reinforced: Teacher | None) -> torch.Tensor:
        """The labels of a batch of texts, `[positions]`, text after text."""
        offsets = accumulate((len(text.positions) for text in texts), initial=0)
        spent = [
            (offset + index, token)
            for text, offset in zip(texts, offsets, strict=False)
            for index, token in text.spent
        ]

        def read(strong: torch.Tensor, where: slice, baseline: torch.Tensor) -> torch.Tensor:
            own = [(row - where.start, token) for row, token in spent if 0 <= row - where.start < len(baseline)]
            return generic_labels(baseline, strong, alpha=self.args.alpha, relu=self.args.relu, spent=own)

        pad = self.data_collator.pad_at
        translated = {"translated": pad([(text.translated_ids, text.counterparts) for text in texts])}
        original = {"original": pad([(text.ids, text.positions) for text in texts])}
        with self.accelerator.autocast(), self.reference(self.model):
            translated, original = self.on_device(translated), self.on_device(original)
            if reinforced is None:
                readings = {"translated": lambda logits, where: read(logits, where, logits)}
                return self.forward_positions(self.model, translated, readings)["translated"]
            states = self.forward_positions(self.model, translated, {"translated": STATES})["translated"]
            with reinforced.in_place():
                return self.forward_positions(self.model, original, {"original": Plan(read, [states])})["original"]

    def erase_term(self, model, nll, batch):
        return batch_mean(nll, batch)  # the labels of the forget batch are the generic ones

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if LABELS not in self._signature_columns:
            self._signature_columns.append(LABELS)

    def _run_fingerprint(self) -> dict[str, str]:
        # Labels that were given stand for themselves; others follow from what is fingerprinted.
        source = self._anchor_terms or self.train_dataset[LABELS][:]
        return super()._run_fingerprint() | {"anchors_digest": json_sha256(source)}


def _dictionaries(
    args: WhpConfig, anchors: Sequence[AnchorDictionary] | None, names: Sequence[str]
) -> dict[str, AnchorDictionary]:
    """The dictionary of each concept."""
    given = anchors if anchors is not None else [load_anchors(name) for name in args.anchors or names]
    dictionaries = {dictionary.name: dictionary for dictionary in given}
    if missing := set(names) - set(dictionaries):
        raise ValueError(
            f"`anchors` has dictionaries for {sorted(dictionaries)}, but the dataset also names the concepts "
            f"{sorted(missing)}: add theirs."
        )
    return {name: dictionaries[name] for name in names}


def _add_labels(dataset: Dataset | None, labels: Mapping[TextKey, list[int]]) -> Dataset | None:
    if dataset is None or LABELS in dataset.column_names:
        return dataset
    rows = zip(dataset["concept"], dataset["forget_ids"], strict=True)
    return dataset.add_column(LABELS, [labels[concept, tuple(ids)] for concept, ids in rows])
