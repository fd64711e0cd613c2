"""Many publications and loads through a Hub at which every third request goes wrong: nothing lost, half or silent."""

import hashlib
import logging
import os
import random
import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from elm_trainer.hub import errors as failures
from elm_trainer.hub.adapter import Access, find_adapter
from elm_trainer.hub.commit import commit_folder, open_repository, read_text
from elm_trainer.hub.errors import HubError
from elm_trainer.hub.info import PUBLISHED_FILES
from tests.hub_server import Answer, Behavior, Corrupt, Cut, Damage, Fault, Slow, Truncate

from .published import adapt, write_published


# `ELM_SOAK=200` takes some minutes.
ROUNDS = int(os.environ.get("ELM_SOAK", "12"))
SEED = int(os.environ.get("ELM_SOAK_SEED", "0"))
REPOS = [f"alice/erased-{number}" for number in range(4)]
# The client checks no hash of small files, and `erasure.json`, which holds those of the others, none of its own.
CHECKED = ("/objects/", "adapter_config.json", "report.json")


class AnyFault(Behavior):
    """Something else that goes wrong at every third request, drawn from a seed."""

    def __init__(self, seed):
        self.rng, self.count, self.lock, self.drawn = random.Random(seed), 0, threading.Lock(), threading.local()
        self.on = True

    def before(self, request, wait):
        with self.lock:
            self.count += 1
            self.drawn.fault = self.draw(request) if self.on and self.count % 3 == 0 else Behavior()
        self.drawn.fault.before(request, wait)

    def instead(self, request):
        return self.drawn.fault.instead(request)

    def after(self, response):
        return self.drawn.fault.after(response)

    def draw(self, request):
        status = self.rng.choice([401, 403, 404, 408, 409, 412, 413, 429, 500, 502, 503, 504, 507, 520])
        faults = [
            Answer(status), Answer(503, {"Retry-After": self.rng.choice(["0", "86400", "soon", "-1"])}), Answer(200),
            *map(Cut, ("before", "request", "answer", "content")), Slow(0.001), Slow(0.001, drip=997),
            Truncate(self.rng.randrange(40)), Truncate(self.rng.randrange(40), consistent=True),
        ]  # fmt: skip
        if any(name in request.path for name in CHECKED):
            faults += [Corrupt(self.rng.randrange(100))] * 3
        if request.method == "PUT":
            faults += [Damage()] * 3
        return self.rng.choice(faults)


def hashes(files):
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != ".gitattributes"}


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def versions(tokenizer, tmp_path):
    """Three versions of a published folder."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folders = []
    for seed in range(3):
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
        folder = write_published(adapt(base, seed=seed), tokenizer, tmp_path / f"version-{seed}", "alice/base")
        (folder / "README.md").write_text(f"---\nlicense: mit\ntags: [elm-trainer]\n---\n# Version {seed}\n")
        folders.append(folder)
    return folders


def test_every_repository_is_whole_at_the_end(hub, hub_api, versions, client_waits, monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(failures, "time", SimpleNamespace(sleep=waits.append))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    rng, faults = random.Random(SEED), AnyFault(SEED)
    known = [hashes(read(folder)) for folder in versions]
    ours = {}
    for repo in REPOS:
        target = open_repository(hub_api, repo)
        ours[repo] = {commit_folder(target, versions[0], message="Version 0", owned=PUBLISHED_FILES).commit}
    hub.fail(Fault("*", ".", faults, times=10**9))
    done = {"published": 0, "loaded": 0, "named": 0}

    # Which request meets which fault depends on how the client's threads take turns, so a short run may load nothing: it then
    # goes on until it has done both, for at most 40 rounds more.
    for number in range(ROUNDS + 40):
        if number >= ROUNDS and done["published"] and done["loaded"]:
            break
        repo = rng.choice(REPOS)
        before = hub.head(repo)
        try:
            if number % 2:
                monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{number}"))
                found = find_adapter(repo, None, Access(cache_dir=tmp_path / f"cache-{number}"))
                read_here = {name: hashlib.sha256(data).hexdigest() for name, data in read(found.folder).items()}
                assert any(read_here.items() <= version.items() for version in known)
                done["loaded"] += 1
            else:
                which = rng.randrange(3)
                target = open_repository(hub_api, repo)
                read_text(target, "README.md")
                made = commit_folder(target, versions[which], message=f"Version {which}", owned=PUBLISHED_FILES)
                assert hashes(hub.files(repo)) == known[which]
                assert made.commit == hub.head(repo) and made.changed == (made.commit != before)
                done["published"] += 1
        except HubError as error:
            done["named"] += 1
            assert str(error) and "signature=" not in str(error)
            if number % 2 == 0 and hub.head(repo) != before:  # made, and said to be
                assert hashes(hub.files(repo)) == known[which]
                assert "holds what was sent as commit" in str(error) or "not whether it was made" in str(error)
        finally:
            shutil.rmtree(tmp_path / f"cache-{number}", ignore_errors=True)

    faults.on = False
    longest = max([0, *waits, *client_waits])
    logging.getLogger(__name__).warning(
        f"{sum(done.values())} rounds, {faults.count} requests, {done}, longest wait {longest} s"
    )
    assert done["published"] and done["loaded"]
    for repo in REPOS:
        commits = hub.commits(repo)
        assert all(hashes(hub.files(repo, commit.oid)) in known for commit in commits[:-1])
        assert all(
            one.files != other.files for one, other in zip(commits, commits[1:], strict=False)
        )  # none made twice
        folder = find_adapter(repo, None, Access(cache_dir=tmp_path / "last")).folder
        assert hashes(read(folder)).items() <= hashes(hub.files(repo)).items()
    assert not list((tmp_path / "tmp").iterdir())
    assert not list(Path(tmp_path / "last").rglob("*.incomplete"))
    assert [hashes(read(folder)) for folder in versions] == known  # local files are only read
    assert max([0, *waits]) <= failures.LONGEST_WAIT
