import gc
import logging

import pytest
from peft import LoraConfig

from elm_trainer import ConceptSources, ElmConfig, ElmTrainer, build_erasure_dataset

from .methods import tiny


@pytest.fixture(scope="session", autouse=True)
def frozen_imports(tokenizer):
    """Every training begins with a garbage collection, which need not search what the imports left: twice as fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def own_handlers():
    """A handler that a test adds to the package's logger would record everything twice in the tests after it."""
    logger = logging.getLogger("elm_trainer")
    before = logger.handlers.copy()
    yield
    logger.handlers[:] = before


@pytest.fixture
def dataset():
    return build_erasure_dataset(
        {
            "capitals": ConceptSources(
                ["Oslo is the capital of Norway.", "Rome is the capital.", "The capital of Peru is Lima, they say."],
                [["Bread needs flour and some water.", "The cat sat on the mat."]],
                [("The capital of", " Norway is one thing, cats are another.")],
            )
        },
        size=8,
    )


@pytest.fixture
def settings(tmp_path):
    """Makes a config of a method for two short steps."""

    def make(config_class, **fields):
        defaults = dict(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        return config_class(**(defaults | fields))

    return make


@pytest.fixture
def config(settings):
    return lambda **fields: settings(ElmConfig, **fields)


@pytest.fixture
def lora():
    return LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(scope="session")
def rows(tokenizer):
    """Built-in rows, whose forget texts have counterfactual novices."""
    return build_erasure_dataset(
        {"capitals": ConceptSources("capitals", ["capitals-near"])}, size=6, processing_class=tokenizer
    )


@pytest.fixture
def make_elm(tokenizer, rows, config, lora):
    """Makes a trainer of a tiny model on `rows`, or other ones."""

    def make(dataset=rows, shape="llama", **fields):
        return ElmTrainer(
            tiny(shape, len(tokenizer)), config(**fields), train_dataset=dataset, processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip

    return make
