from pathlib import Path

import pytest
import yaml

from elm_trainer import ElmConfig
from elm_trainer.concept import concept_presets


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*-capitals*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_known_concepts_and_settings(path):
    record = yaml.safe_load(path.read_text())
    assert set(record["concepts"]) <= set(concept_presets())
    known = set(ElmConfig.__dataclass_fields__)
    config = ElmConfig(**{name: value for name, value in record.items() if name in known})
    assert config.max_steps == record["max_steps"]
