"""Erasure of Language Memory (arXiv 2410.02760): the trainer. Its equations are in docs/papers.md."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..data.collator import ElmDataCollator
from ..head import STATES, Plan, Reading
from ..modeling import decoder_layers, reentrant
from ..objectives import (
    LogTarget,
    SparseDistribution,
    argmax_cross_entropy,
    disagreement,
    erasure_target,
    kl_divergence,
    kl_to_reference,
    log_mean_probs,
    log_space_divergence,
    log_space_loss,
    log_space_target,
    mean_log_probs,
    position_weights,
    ramped_eta,
    soft_cross_entropy,
    top_k_distribution,
)
from .base import ErasureTrainer
from .elm_config import (
    ElmConfig,
    always_erases,
    batch_weights,
    check_novices,
    chosen_state_layers,
    is_counterfactual,
    named_concepts,
    stored_targets,
    term_weights,
)
from .elm_layers import FrozenLayers, LayerStates, measure_scale, novice_targets, state_loss
from .forward import SUB_BATCHES, batch_mean, context_places, in_float32, nll_reading, weighted_batches
from .placement import contrast_adapter
from .targets import TargetPlan, Teacher, precompute_targets


logger = logging.get_logger(__name__)
SIDES = ("expert", "novice")


class ElmTrainer(ErasureTrainer):
    """Trainer for Erasure of Language Memory (ELM).

    `Loss = λe·erase + λs·state + λr·retain + λc·consistency`, each the mean over rows of the mean over their text's positions (0 for a
    row without a synthetic pair; those of the erase term include what follows the text's last token, but for a
    counterfactual novice):
    soft cross-entropy with [`erasure_target`] on forget text (with `log_tokens`: [`log_space_divergence`] and
    [`log_space_loss`] to [`log_space_target`]), or [`state_loss`] to a counterfactual novice's states; KL, argmax cross-entropy,
    [`log_space_divergence`] or [`state_loss`] to the reference on retain text; negative log-likelihood of the completion of
    synthetic pairs.

    Takes the arguments of [`~trl.SFTTrainer`] and raises what [`ErasureTrainer`] raises.

    Example:

    ```python
    trainer = ElmTrainer(
        model, ElmConfig("outputs"), train_dataset=dataset, processing_class=tokenizer, peft_config=LoraConfig(r=32)
    )
    trainer.train()
    ```
    """

    _name = "ELM"
    _config_class = ElmConfig
    args: ElmConfig

    def set_up(self):
        args = self.args
        # Adapters that stand for expert and novice while targets are computed.
        self._teachers: dict[str, Teacher] = {}
        # Whether there is a consistency term, though some batches may have no part in it.
        self._consistent = False
        if args.consistency_weight and self.train_dataset is not None:
            self._consistent = any(map(len, self.train_dataset["synthetic_ids"]))
            if not self._consistent:
                logger.warning(
                    f"`consistency_weight` is {args.consistency_weight}, but no row of the dataset has a synthetic pair (columns "
                    "`prompt` and `completion`), so there is no consistency term: add pairs, or set it to 0."
                )
        # Layers of the state term, and its scale, `[layers, hidden]`.
        self._state_layers: list[int] = []
        if args.state_weight:
            depth = len(decoder_layers(self.accelerator.unwrap_model(self.model)))
            self._state_layers = chosen_state_layers(args.state_layers, depth)
        logits = always_erases(args) or self._consistent or (args.retain_weight and args.retain_loss != "states")
        self._frozen = FrozenLayers(self, None if logits or not self._state_layers else self._state_layers[-1])
        if self._state_layers and self.train_dataset is not None:
            self._state_scale = measure_scale(self, self._state_layers)
        if stored := precompute_targets(self, self.target_plan()):
            self.data_collator.targets = stored
        if args.contrast_rows and self.train_dataset is not None:
            contrast_adapter(self)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args = self.args
        batches = weighted_batches(inputs, batch_weights(args))
        aimed = {term: batches[term] for term in ("erase", "retain") if term in batches}
        targets = {term: batch["target"] for term, batch in aimed.items() if "target" in batch}
        erases = self.erases()
        if live := {term: batch for term, batch in aimed.items() if term not in targets}:
            targets |= self.targets(model, live, erases=erases)
        readings = {term: self._position_loss(term, batch, targets.get(term)) for term, batch in batches.items()}
        spared = self._frozen.spared(model, batches, readings)
        with spared, LayerStates(self, model, batches, self._state_layers) as states:
            losses = self.forward_positions(model, batches, readings)  # [positions] each
        if self._state_layers and not (erases and args.erase_after):
            losses["state"] = self._state_loss(states.of("erase"), targets["erase"]["novice_states"])
        if "retain" in batches and args.retain_loss == "states":
            behind = args.log_retain * losses["retain"] if erases and args.log_retain else 0  # behind all layers
            losses["retain"] = self._state_loss(states.of("retain"), targets["retain"]["layer_states"]) + behind
        if not erases:
            losses.pop("erase", None)
        for term in {"erase", "state"} & losses.keys():
            losses[term] = losses[term] * targets["erase"]["weights"]
        if "retain" in losses and args.retain_focus:
            moved = losses["retain"].detach().clamp(min=1e-6)
            losses["retain"] = losses["retain"] * _weights(moved, batches["retain"], args.retain_focus)
        rows = inputs["forget"]["input_ids"].size(0)
        batches["state"] = batches.get("erase")
        terms = {term: batch_mean(values, batches[term], rows) for term, values in losses.items()}
        if self._consistent and "consistency" not in terms:
            # Logged as it counts: a batch without pairs is one whose rows add nothing.
            terms["consistency"] = torch.zeros((), device=args.device)
        loss = self.weigh(terms, term_weights(args))
        return (loss, None) if return_outputs else loss

    def erases(self) -> bool:
        """Whether the step has an erase term, as of `erase_after`."""
        state, args = self.state, self.args
        return bool(args.erase_weight) and state.global_step >= args.erase_after * state.max_steps

    def _state_loss(self, hidden: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
        return state_loss(hidden, aim.view(hidden.shape), self._state_scale)

    def packed_together(self):
        step = tuple(SUB_BATCHES[term] for term, weight in batch_weights(self.args).items() if weight)
        if getattr(self.data_collator, "targets", None) is not None:
            return [step]
        sides = ("forget", "forget.counterfactual.extra", "forget.expert", "forget.novice")
        return [step, sides * ("forget" in step) + ("retain",) * ("retain" in step)]

    def _position_loss(
        self, term: str, batch: Mapping[str, Any], target: Mapping[str, torch.Tensor] | None
    ) -> Reading | Plan:
        """The loss of each position of a term, as a function of its logits, and in log space of the reference's."""
        if target is None:
            return nll_reading(batch)
        erases, retain_loss = self.erases(), self.args.retain_loss
        alone = {"erase": not erases, "retain": retain_loss == "states" and not (erases and self.args.log_retain)}
        if alone.get(term):
            return STATES  # no logits are read where states alone are compared
        if term == "retain" and retain_loss in ("log", "states"):
            return Plan(lambda logits, where, reference: log_space_divergence(logits, reference), [target["states"]])
        if term == "erase" and self.args.log_tokens:
            chosen = LogTarget(target["indices"], target["log_probs"])
            divergence = kl_divergence if self.args.log_others == "novice" else log_space_divergence

            def in_log_space(logits: torch.Tensor, where: slice, others: torch.Tensor) -> torch.Tensor:
                part = chosen.part(where)
                with torch.no_grad():
                    whole = part.over(others)
                return divergence(logits, whole) + self.args.log_strength * log_space_loss(logits, part)

            return Plan(in_log_space, [target["states"]])
        aim = SparseDistribution(target["indices"], target["probs"])
        if term == "erase":
            return lambda logits, where: soft_cross_entropy(logits, aim.part(where))
        if retain_loss == "kl":
            return lambda logits, where: kl_to_reference(logits, aim.part(where))
        return lambda logits, where: argmax_cross_entropy(logits, aim.indices[where, 0])

    def target(self, model: nn.Module, term: str, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What the adapted model is to match on the sub-batch of a term, `"erase"` or `"retain"`.

        Returns:
            `dict[str, torch.Tensor]`: for each position, `indices` with `probs` or `log_probs`, `[positions, tokens]`,
            what enters the reference's head (or that of its novice, with `log_others="novice"`), `states`, `[positions, hidden]`, or, of
            a retain term of states, also what its layers give, `layer_states`, `[positions, layers·hidden]`; of the erase term also `weights`, and for the state term `expert_states`
            and `novice_states` alike.
        """
        return self.targets(model, {term: batch})[term]

    def targets(
        self, model: nn.Module, batches: Mapping[str, Mapping[str, Any]], *, erases: bool = True
    ) -> dict[str, dict[str, torch.Tensor]]:
        """[`target`] of several terms, from one forward of the reference over all of their texts, those behind contexts and
        counterfactual novices too; throw-away adapters each run one of their own. Without `erases` only what the state term needs of
        that of the erase term.
        """
        args = self.args
        erase, retain = batches.get("erase"), batches.get("retain")
        counterfactual = erase.get("counterfactual") if erase else None
        parts: dict[str, Mapping[str, Any]] = {}
        readings: dict[str, Reading | Plan] = {}
        # What experts and then novices say at the positions of forget text: states of teachers, places in this forward.
        taught: list[torch.Tensor] = []  # filled by the forwards of the teachers, before the one that reads it
        places: list[torch.Tensor] = []
        # Where positions weigh the same and no term reads logits, nobody asks for that.
        erases = erases and bool(args.erase_weight)
        silent = not (erases or args.fact_share)
        if erase:
            parts["erase"], readings["erase"] = erase, STATES
            if counterfactual:
                places += [] if silent else counterfactual["index"]
                if "extra" in counterfactual:
                    parts["extra"], readings["extra"] = counterfactual["extra"], STATES
            for side in SIDES:
                if side in erase:
                    offset = sum(part["input_ids"].numel() for part in parts.values())
                    places += context_places(erase, side, args.contexts_per_sample) + offset
                    parts[side], readings[side] = erase[side], STATES
            if not silent:
                # Of a counterfactual novice the first draw: its mean over draws is flat where each of them names another answer.
                others = {"reference": 0, "novice": 1}[args.log_others] if args.log_tokens and erases else None
                readings["erase"] = Plan(self.erase_reading(erase, erases), taught, places, others)
        if retain:
            states_alone = args.retain_loss in ("log", "states")
            parts["retain"] = retain
            readings["retain"] = (
                STATES if states_alone else lambda logits, where: top_k_distribution(logits, args.top_k)
            )
        watched = self._state_layers if counterfactual or args.retain_loss == "states" else []
        with self.reference(model), self._target_precision(model):
            for side, teacher in self._teachers.items() if erase and not counterfactual else ():
                with teacher.in_place():
                    taught.append(self.forward_positions(model, {side: batches["erase"]}, {side: STATES})[side])
            spared = self._frozen.spared(model, parts, readings, leaving=batches)
            with spared, LayerStates(self, model, parts, watched) as states:
                found = self.forward_positions(model, parts, readings)
        made: dict[str, dict[str, torch.Tensor]] = {}
        if erase:
            even = {"weights": torch.ones_like(erase["rows"], dtype=torch.float32)}
            made["erase"] = even if silent else self.erase_target(found["erase"], erase)
            if counterfactual and states.outputs:
                made["erase"] |= novice_targets(states, counterfactual["index"], args.state_eta)
        if retain:
            if args.retain_loss == "states":
                made["retain"] = {"layer_states": states.of("retain").flatten(1)}
                made["retain"] |= {"states": found["retain"]} if erases and args.log_retain else {}
            elif args.retain_loss == "log":
                made["retain"] = {"states": found["retain"]}
            else:
                made["retain"] = dict(zip(("indices", "probs"), found["retain"], strict=True))
        return made

    def erase_target(self, found: Sequence[torch.Tensor], batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The [`target`] of the erase term, of what its reading gave."""
        apart, *rest = found
        names = ("indices", "log_probs" if self.args.log_tokens else "probs", "states")
        return dict(zip(names, rest, strict=False)) | {"weights": _weights(apart, batch, self.args.fact_share)}

    def erase_reading(self, batch: Mapping[str, Any], erases: bool = True) -> Reading:
        """`t = b − η·(e − n)` of the reference (and the teachers), see [`erasure_target`] and [`log_space_target`], with how far
        expert and novice are apart, or, without `erases`, that alone.
        """
        args, eta = self.args, self._eta(batch)
        experts = 1 if args.expert_steps else args.contexts_per_sample

        def read(base: torch.Tensor, where: slice, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if "counterfactual" in batch:
                expert, novice = base, log_mean_probs(others)
            else:
                # Without a novice of its own, the reference is the novice.
                expert, novice = mean_log_probs(others[:experts]), mean_log_probs(others[experts:] or [base])
            apart = disagreement(expert, novice)
            if not erases:
                return (apart,)
            if args.log_tokens:
                return (apart, *log_space_target(base, expert, novice, eta=eta[where], tokens=args.log_tokens))
            assert args.tau is not None  # `ElmConfig.__post_init__` has filled what was left out.
            target = erasure_target(
                base, expert, novice, eta=eta[where], temperature=args.tau, top_k=args.top_k,
                plausibility=args.plausibility,
            )  # fmt: skip
            return (apart, *target)

        return read

    def _eta(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """η of each position of the forget text, `[positions]`: that of the token which predicts the next, as released."""
        assert self.args.eta is not None and self.args.eta_end is not None
        mask = batch["attention_mask"]
        position = (mask.cumsum(-1) - 1)[batch["rows"], batch["columns"]]
        return ramped_eta(position, mask.sum(-1)[batch["rows"]], self.args.eta, self.args.eta_end)

    def target_plan(self) -> TargetPlan:
        """What is computed once for all training rows: the targets of both terms."""
        args, config = self.args, self.model.config.get_text_config()
        layout, settings, columns = stored_targets(args, config.vocab_size, config.hidden_size, self._state_layers)
        for name in ("behind_names", "whole_retain"):
            if getattr(self.data_collator, name, False):
                settings[name] = True

        def compute(inputs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
            parts: list[dict[str, torch.Tensor]] = [{} for _ in inputs["forget"]["lengths"]]
            batches = weighted_batches(inputs, batch_weights(args) | {"consistency": 0.0})
            for term, made in self.targets(self.model, batches).items():
                counts = torch.bincount(batches[term]["rows"], minlength=len(parts)).tolist()
                for key, values in made.items():
                    name = f"{SUB_BATCHES[term]}_{key}"
                    if name not in layout.fields:
                        continue
                    if values.dim() == 2:
                        values = values[:, : layout.fields[name].width]
                    for part, piece in zip(parts, values.cpu().split(counts), strict=True):
                        part[name] = piece
            return parts

        return TargetPlan(
            switch="precompute_targets",
            layout=layout,
            settings=settings,
            columns=columns,
            compute=compute,
            contexts=bool(args.erase_weight) and args.novice == "contexts",
            prepare=self._tuned_teachers,
        )

    @contextmanager
    def _tuned_teachers(self) -> Iterator[None]:
        """The throw-away adapters, tuned on entry and gone on exit."""
        args = self.args
        sides = (("expert", args.expert_steps, "forget_ids"), ("novice", args.novice_steps, "novice_ids"))
        try:
            for side, steps, column in sides:
                if steps and args.erase_weight:
                    self._teachers[side] = Teacher.fit(self, side, list(self.train_dataset[column]), steps)
            with self._target_precision(self.model):
                yield
        finally:
            for teacher in self._teachers.values():
                teacher.remove()
            self._teachers.clear()

    def _target_precision(self, model: nn.Module) -> AbstractContextManager[None]:
        float32 = self.args.target_dtype == "float32"
        return in_float32(self.accelerator.unwrap_model(model)) if float32 else nullcontext()

    def default_collator(self, args, processing_class, datasets):
        counterfactual = is_counterfactual(args)
        return ElmDataCollator(
            processing_class,
            concepts=None if args.expert_steps or counterfactual else named_concepts(args, datasets),
            counterfactual=counterfactual,
            past_end=not counterfactual,
            faithful=args.faithful,
            contexts_per_sample=args.contexts_per_sample,
            behind_names=counterfactual
            and not (always_erases(args) or args.state_names),  # a name's states are to stay
            whole_retain=args.retain_loss == "states",
            pad_to_multiple_of=args.pad_to_multiple_of,
            seed=args.seed,
        )

    def check_given(self, model, args, datasets, data_collator):
        if args.expert_steps and any(name.startswith("eval_dataset") for name in datasets):
            raise ValueError(
                f"`eval_dataset` is given with `expert_steps={args.expert_steps}`, whose adapters are gone when training "
                "starts, so that only training rows have targets: leave one of the two out."
            )
        if args.expert_steps and getattr(data_collator, "concepts", None) is not None:
            raise ValueError(
                f"`data_collator` brings contexts, with which the adapters of `expert_steps={args.expert_steps}` would be tuned "
                "and never used: leave its `concepts` out, or set `expert_steps` to 0."
            )
        if is_counterfactual(args):
            check_novices(datasets)
        if args.state_weight:
            if reentrant(args):
                raise ValueError(
                    "`gradient_checkpointing_kwargs` has `use_reentrant=True` (DeepSpeed ZeRO-3 forces it), through which no "
                    "gradient reaches what layers give: set it to False, `gradient_checkpointing=False`, or `state_weight=0`."
                )
            chosen_state_layers(args.state_layers, len(decoder_layers(model)))
        vocabulary = model.config.get_text_config().vocab_size
        if args.top_k > vocabulary:
            raise ValueError(f"`top_k` is {args.top_k}, but the vocabulary has {vocabulary} tokens: lower it.")


def _weights(values: torch.Tensor, batch: Mapping[str, Any], share: float) -> torch.Tensor:
    return position_weights(values, batch["rows"], batch["input_ids"].size(0), share)
