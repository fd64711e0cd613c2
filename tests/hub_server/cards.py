"""The metadata at the top of a `README.md`: reading, checking, and the tags that follow from it."""

from collections.abc import Iterable, Mapping
from typing import Any

import yaml


RELATIONS = ("adapter", "finetune", "merge", "quantized")


def read_metadata(readme: str) -> dict[str, Any]:
    """The YAML block of a card; empty if there is none.

    Raises:
        ValueError: if the block is not a mapping in YAML.
    """
    lines = readme.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---" or "---" not in [line.rstrip() for line in lines[1:]]:
        return {}
    end = [line.rstrip() for line in lines].index("---", 1)
    try:
        metadata = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError as error:
        raise ValueError(f"YAML is not readable: {error}") from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError("YAML must be an object")
    return metadata


def find_errors(metadata: Mapping[str, Any]) -> list[str]:
    """What the Hub would not accept: values of the wrong type, and a `model-index` of the wrong shape."""
    errors = [
        f'"{key}" must be a string'
        for key in ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation")
        if not isinstance(metadata.get(key, ""), str)
    ]
    errors += [
        f'"{key}" must be a string or an array of strings'
        for key in ("base_model", "datasets", "language", "license", "metrics")
        if not all(isinstance(value, str) for value in as_list(metadata.get(key)))
    ]
    if not isinstance(metadata.get("tags", []), list) or not all(
        isinstance(tag, str) for tag in as_list(metadata.get("tags"))
    ):
        errors.append('"tags" must be an array of strings')
    if metadata.get("base_model_relation", "adapter") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    if "model-index" in metadata:
        errors += _errors_of_model_index(metadata["model-index"])
    return errors


def _errors_of_model_index(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or "results" not in model:
            errors.append(f'"model-index[{i}]" must have "name" and "results"')
            continue
        for j, result in enumerate(model["results"] or []):
            place = f"model-index[{i}].results[{j}]"
            required = {"task": ("type",), "dataset": ("type", "name")}
            for part, keys in required.items():
                found = result.get(part)
                errors += [
                    f'"{place}.{part}.{key}" is required'
                    for key in keys
                    if not isinstance(found, dict) or not isinstance(found.get(key), str)
                ]
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{place}.metrics" must be an array of at least one')
                continue
            errors += [
                f'"{place}.metrics[{k}]" must have "type" and "value"'
                for k, metric in enumerate(metrics)
                if not isinstance(metric, dict) or not isinstance(metric.get("type"), str) or "value" not in metric
            ]
    return errors


def tags_of(metadata: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The tags by which a repository is found: those of the card, and those that follow from it and its files."""
    paths = list(paths)
    tags = [str(metadata[key]) for key in ("library_name", "pipeline_tag") if metadata.get(key)]
    tags += [end for end in ("safetensors", "gguf") if any(path.endswith(f".{end}") for path in paths)]
    tags += [str(tag) for tag in as_list(metadata.get("tags"))]
    tags += [str(language) for language in as_list(metadata.get("language"))]
    tags += [f"dataset:{dataset}" for dataset in as_list(metadata.get("datasets"))]
    relation = metadata.get("base_model_relation") or ("adapter" if "adapter_config.json" in paths else "finetune")
    for base in as_list(metadata.get("base_model")):
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    for key, prefix in (
        ("license", "license"),
        ("task_categories", "task_categories"),
        ("size_categories", "size_categories"),
    ):
        tags += [f"{prefix}:{value}" for value in as_list(metadata.get(key))]
    return [*dict.fromkeys(tags), "region:us"]


def as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
