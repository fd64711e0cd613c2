"""How the small models of the gold standard are trained: tokenizer, plain training, plain gradient ascent."""

import tempfile
from collections.abc import Sequence

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ...methods.base import ErasureTrainer


_PAD, _END = "<pad>", "<end>"


class GradientAscentTrainer(ErasureTrainer):
    """The plainest baseline: raise the negative log-likelihood of forget text, and lower that of retain text."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batches = {name: inputs[name] for name in ("forget", "retain")}
        means = {name: values.mean() for name, values in self.position_losses(model, batches).items()}
        loss = self.weigh(means, {"forget": -1.0, "retain": 1.0})
        return (loss, None) if return_outputs else loss


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts."""
    tokenizer = Tokenizer(models.BPE())
    # With a space before the first word, a name is the same token wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END)


def fine_tune(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    schedule: str,
    warmup_steps: int = 0,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train all weights on texts by next-token prediction, with [`~transformers.Trainer`].

    Args:
        model ([`~transformers.PreTrainedModel`]): Model, trained in place.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        texts (`Sequence[str]`): Texts; each is closed by the end-of-text token.
        steps (`int`): Steps.
        batch_size (`int`): Texts per step.
        learning_rate (`float`): Largest learning rate.
        schedule (`str`): Name of its schedule.
        warmup_steps (`int`, *optional*, defaults to `0`): Steps until it is reached.
        seed (`int`): Seed of the order of the texts: the same number of texts comes in the same order.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Called along the way.
    """
    ids = processing_class([text + processing_class.eos_token for text in texts])["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type=schedule,
                warmup_steps=warmup_steps,
                seed=seed,
                save_strategy="no",
                report_to="none",
                bf16=False,
                activation_checkpointing=False,
                disable_tqdm=True,
                logging_strategy="no",
            ),
            data_collator=DataCollatorForLanguageModeling(processing_class, mlm=False),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
