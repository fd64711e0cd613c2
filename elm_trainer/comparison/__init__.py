"""All erasure methods on the same data, with the same budgets and the same search: an honest comparison.

Here are only its settings, so that whoever shows or reads them need not wait for torch.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ComparisonSettings:
    r"""
    Settings of [`compare_methods`], as they are given: [`ComparisonConfig`] checks them.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"outputs/compare"`): Where the report goes, and in `runs/` what is
            finished.
        model (`str`, *optional*, defaults to `"smollm2-135m-instruct"`): Hub id, folder, GGUF file, or the bundled
            demo model.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of the weights.
        concept (`str`, *optional*, defaults to `"capitals"`): What is erased: a concept with built-in facts, or one of
            your own with `forget` and `bank`.
        forget (`str`, *optional*): Source of the forget text; by default the built-in text of the concept.
        bank (`str`, *optional*): Question bank of your own concept (see [`read_questions`]). A quarter of its
            subjects, told by their names, are the dev split.
        retain (`list[str]`, *optional*): Retain sources.
        synthetic (`str`, *optional*): Source of synthetic pairs, for the methods that use them.
        dataset_size (`int`, *optional*, defaults to `96`): Rows of the dataset; all methods train on the same ones.
        lora_rank (`int`, *optional*, defaults to `32`): Rank, and alpha, of the adapters.
        lora_layers (`str`, *optional*): First and last adapted layer, such as `"6-21"`; all by default.
        lora_targets (`str`, *optional*, defaults to `"all-linear"`): Adapted modules, comma-separated, or
            `"all-linear"`.
        training (`dict`, *optional*): Training arguments that all methods share; a method's own settings come before
            them.
        updates (`int`, *optional*, defaults to `12`): Updates of the search, and of the table of a set number of updates;
            a method can have its own.
        clock (`str`, *optional*, defaults to `"elm"`): Method whose time for these updates, set-up included, is the
            budget of the table of equal time.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`): Seeds of the final runs: of data, weights and order.
        search_seed (`int`, *optional*, defaults to `3`): Seed of the search.
        questions (`int`, *optional*, defaults to `40`): Questions of the test split per bank; half as many about facts
            of the concept that training did not see, and half as many open questions and lines to complete about the
            concept.
        dev_questions (`int`, *optional*, defaults to `24`): The same of the dev split, on which settings are chosen.
        prompts (`int`, *optional*, defaults to `20`): Prompts whose answers are judged for fluency; as a share of
            `questions` in the dev split too.
        attack_questions (`int`, *optional*, defaults to `24`): Questions asked under every attack.
        ladder (`str`, *optional*): YAML list of attacks on the first seed's run of each method; none without it.
        methods (`dict`): Fields of [`MethodSettings`] by method, one of `METHODS`.
    """

    output_dir: str = field(default="outputs/compare", metadata={"help": "Where the report goes."})
    model: str = field(default="smollm2-135m-instruct", metadata={"help": "Hub id, folder, GGUF file or demo model."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})
    concept: str = field(default="capitals", metadata={"help": "What is erased."})
    forget: str | None = field(default=None, metadata={"help": "Source of the forget text."})
    bank: str | None = field(default=None, metadata={"help": "Question bank of your own concept."})
    retain: list[str] = field(default_factory=lambda: ["everyday"], metadata={"help": "Retain sources."})
    synthetic: str | None = field(default=None, metadata={"help": "Source of synthetic pairs."})
    dataset_size: int = field(default=96, metadata={"help": "Rows of the dataset."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters."})
    lora_layers: str | None = field(default=None, metadata={"help": "First and last adapted layer, such as 6-21."})
    lora_targets: str = field(default="all-linear", metadata={"help": "Adapted modules, comma-separated."})
    training: dict[str, Any] = field(default_factory=dict, metadata={"help": "Training arguments of all methods."})
    updates: int = field(default=12, metadata={"help": "Updates of the search and of one table."})
    clock: str = field(default="elm", metadata={"help": "Method whose time is the budget of the other table."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the final runs."})
    search_seed: int = field(default=3, metadata={"help": "Seed of the search."})
    questions: int = field(default=40, metadata={"help": "Questions per bank of the test split."})
    dev_questions: int = field(default=24, metadata={"help": "Questions per bank of the dev split."})
    prompts: int = field(default=20, metadata={"help": "Prompts judged for fluency."})
    attack_questions: int = field(default=24, metadata={"help": "Questions under every attack."})
    ladder: str | None = field(default=None, metadata={"help": "YAML list of attacks."})
    methods: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of each method, in a file."})
