"""Throw-away adapters: ELM's expert and novice where a context hardly changes a small model, and WHP's reinforced model."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel
from tqdm.auto import tqdm

from .base import ErasureTrainer
from .forward import nll_reading


class Teacher:
    """A LoRA adapter beside the trained one, fine-tuned by next-token prediction and removed after use.

    Args:
        model (`PeftModel`): Model that carries it.
        name (`str`): Name of its adapter, such as `"expert"`; the model must have none of that name yet.
        trained (`str`): Name of the adapter that is trained to erase.
    """

    def __init__(self, model: PeftModel, name: str, trained: str):
        self._model, self._name, self._trained = model, name, trained
        self._frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]

    @classmethod
    def fit(cls, trainer: ErasureTrainer, name: str, texts: Sequence[list[int]], steps: int) -> "Teacher":
        """Add the adapter and fine-tune it on tokenized texts; the global random state is left as it was.

        Args:
            trainer ([`ErasureTrainer`]): Trainer, whose config has `teacher_rank`, `teacher_learning_rate` and
                `teacher_batch_size`.
            name (`str`): Name of the adapter.
            texts (`Sequence[list[int]]`): Token ids of the texts.
            steps (`int`): Steps, over which the learning rate decays to 0.

        Raises:
            ValueError: if the texts are empty (the dataset has no permuted facts).
        """
        texts = [ids for ids in texts if len(ids) > 1]
        args = trainer.args
        if not texts:
            raise ValueError(
                f"`{name}_steps` is {steps}, but the dataset's column for it is empty: only sources that can permute "
                "their facts fill `novice`; set `novice_steps` to 0."
            )
        model = trainer.model
        # With an own seed and a forked state, a resumed run repeats these adapters exactly.
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(args.seed)
            own = name
            while own in model.peft_config:  # an adapter of the user's
                own += "_"
            teacher = cls(model, own, model.active_adapter)
            # Inside a module that the trained adapter saves whole, an adapter would change the names of what is saved.
            whole = "|".join(map(re.escape, model.active_peft_config.modules_to_save or ()))
            model.add_adapter(
                own,
                LoraConfig(
                    r=args.teacher_rank,
                    lora_alpha=args.teacher_rank,
                    target_modules="all-linear",
                    exclude_modules=rf"(.*\.)?({whole})(\..*)?" if whole else None,
                ),
            )
            model.set_adapter(own)
            if args.gradient_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=args.teacher_learning_rate)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            model.train()
            generator = torch.Generator().manual_seed(args.seed)
            order: list[int] = []
            disable = not trainer.accelerator.is_local_main_process
            for _ in tqdm(range(steps), desc=f"Tuning the {name}", disable=disable):
                if len(order) < args.teacher_batch_size:
                    order += torch.randperm(len(texts), generator=generator).tolist()
                chosen, order = order[: args.teacher_batch_size], order[args.teacher_batch_size :]
                batch = trainer.data_collator.pad([(texts[index], 0) for index in chosen])
                batch = trainer.on_device(batch)
                with trainer.accelerator.autocast():
                    loss = trainer.forward_positions(model, {name: batch}, {name: nll_reading(batch)})[name].mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            if args.gradient_checkpointing:
                model.activation_checkpointing_disable()  # training enables it in its own way
            teacher._back()
        return teacher

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While this holds, the model, whose adapters the caller has disabled, is the teacher."""
        model = self._model
        model.set_adapter(self._name)
        model.base_model.enable_adapter_layers()
        try:
            yield
        finally:
            model.base_model.disable_adapter_layers()
            self._back()

    def remove(self) -> None:
        """Delete the adapter, so that nothing it learned can be saved."""
        self._model.delete_adapter(self._name)
        self._back()

    def _back(self) -> None:
        """Make the trained adapter the active one again; PEFT makes all of it trainable, what was frozen too."""
        self._model.set_adapter(self._trained)
        for parameter in self._frozen:
            parameter.requires_grad_(False)
