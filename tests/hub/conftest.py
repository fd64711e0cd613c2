import pytest

from tests.hub_server import client_waits, hub, hub_api  # noqa: F401

from .reports import local  # noqa: F401


@pytest.fixture
def folder(tmp_path):
    """A folder with a small text, a report and weights."""
    folder = tmp_path / "staged"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# One\n")
    (folder / "report.json").write_text('{"figure": 1}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    return folder


@pytest.fixture
def base_folder(tiny_model, tokenizer, tmp_path):
    """A folder with a tiny base and its tokenizer."""
    tiny_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"
