"""One folder, one commit: whatever goes wrong, the Hub holds the old or the new, and this machine what it held."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from elm_trainer.hub import errors as failures
from elm_trainer.hub.commit import commit_folder, open_repository, read_text
from elm_trainer.hub.errors import ConflictError, UploadError
from elm_trainer.hub.info import PUBLISHED_FILES
from tests.hub_server import Answer, Call, Cut, Fault, Slow


REPO = "alice/erased"
COMMIT = "/commit/"


def local(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub, revision="main") -> dict[str, bytes]:
    return {name: data for name, data in hub.files(REPO, revision).items() if name != ".gitattributes"}


def publish(api, folder, **options):
    target = open_repository(api, REPO)
    return commit_folder(target, folder, message="Publish", owned=PUBLISHED_FILES, **options)


def test_a_new_repository_is_private_and_holds_the_folder_in_one_commit(hub, hub_api, folder):
    publication = publish(hub_api, folder, tag="v1")

    assert published(hub) == local(folder)
    assert hub.head(REPO) == hub.head(REPO, "v1") == publication.commit
    assert len(hub.commits(REPO)) == 2  # the Hub's own first one, and ours
    assert hub_api.model_info(REPO).private
    assert publication.changed and publication.url == f"{hub.endpoint}/{REPO}"


def test_a_file_in_parts_arrives_whole(hub, hub_api, folder):
    (folder / "adapter_model.safetensors").write_bytes(hashlib.sha256(b"seed").digest() * 600_000)

    publish(hub_api, folder)

    assert published(hub) == local(folder)


def test_a_name_without_namespace_is_the_users_own(hub, hub_api, folder):
    target = open_repository(hub_api, "erased")

    assert target.repo_id == REPO


def test_the_same_folder_again_commits_nothing(hub, hub_api, folder):
    first = publish(hub_api, folder)
    asked = len(hub.requests)

    second = publish(hub_api, folder)

    assert (second.commit, second.changed) == (first.commit, False)
    assert len(hub.commits(REPO)) == 2
    assert {request.method for request in hub.requests[asked:]} <= {"GET", "HEAD"}


def test_what_is_no_longer_published_goes_and_what_others_added_stays(hub, hub_api, folder):
    (folder / "attacks.png").write_bytes(b"\x89PNG")
    publish(hub_api, folder)
    hub_api.upload_file(path_or_fileobj=b"notes", path_in_repo="NOTES.md", repo_id=REPO)
    (folder / "attacks.png").unlink()

    publish(hub_api, folder)

    assert published(hub) == local(folder) | {"NOTES.md": b"notes"}


def test_a_branch_is_made_and_main_stays(hub, hub_api, folder):
    before = publish(hub_api, folder).commit
    (folder / "report.json").write_text('{"figure": 2}')

    target = open_repository(hub_api, REPO, revision="trial")
    commit_folder(target, folder, message="Try")

    assert hub.head(REPO) == before
    assert published(hub, "trial") == local(folder)


def test_a_pull_request_leaves_the_branch(hub, hub_api, folder):
    before = publish(hub_api, folder).commit
    (folder / "report.json").write_text('{"figure": 2}')

    publication = publish(hub_api, folder, create_pr=True)

    assert hub.head(REPO) == before
    assert published(hub, publication.pull_request) == local(folder)


def test_a_tag_of_another_commit_is_refused_before_anything_is_sent(hub, hub_api, folder):
    before = publish(hub_api, folder, tag="v1").commit
    (folder / "report.json").write_text('{"figure": 2}')

    with pytest.raises(ValueError, match="`tag` is 'v1'.*choose another"):
        publish(hub_api, folder, tag="v1")

    assert hub.head(REPO) == before


@pytest.mark.parametrize("private", [True, False])
def test_visibility_that_differs_is_refused(hub, hub_api, private):
    hub_api.create_repo(REPO, private=not private)

    with pytest.raises(ValueError, match=f"`private` is {private}"):
        open_repository(hub_api, REPO, private=private)


def test_the_text_of_the_repository_is_read_at_the_commit_that_is_built_on(hub, hub_api, folder):
    publish(hub_api, folder)

    target = open_repository(hub_api, REPO)

    assert read_text(target, "README.md") == (folder / "README.md").read_text()
    assert read_text(target, "missing.md") is None


def test_a_failure_of_xet_is_named_too(hub, hub_api, folder, monkeypatch):
    publish(hub_api, folder)
    old = published(hub)
    (folder / "adapter_model.safetensors").write_bytes(b"others!" * 1000)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.fail(Fault("*", "xet-write-token", Answer(403), times=99))

    with pytest.raises(UploadError, match="Sending large files.*publish again"):
        publish(hub_api, folder)

    assert published(hub) == old


def test_a_hub_that_stays_silent_is_given_up(hub, hub_api, folder, monkeypatch):
    publish(hub_api, folder)
    old = published(hub)
    (folder / "report.json").write_text('{"figure": 2}')
    monkeypatch.setattr(failures, "SILENCE_SECONDS", 0.2)
    hub.fail(Fault("POST", COMMIT, Slow(60), times=99))

    with pytest.raises(UploadError, match="publish again"):
        publish(hub_api, folder)

    assert published(hub) == old


def test_a_commit_by_another_in_between_is_a_conflict_and_nothing_is_lost(hub, hub_api, folder):
    publish(hub_api, folder)
    (folder / "report.json").write_text('{"figure": 2}')

    def other():
        hub_api.upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id=REPO)

    hub.fail(Fault("POST", COMMIT, Call(other)))

    with pytest.raises(ConflictError, match="publish again"):
        publish(hub_api, folder)
    assert published(hub)["theirs.txt"] == b"theirs"

    publish(hub_api, folder)
    assert published(hub) == local(folder) | {"theirs.txt": b"theirs"}


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub, hub_api, folder):
    publish(hub_api, folder)
    (folder / "report.json").write_text('{"figure": 2}')
    hub.fail(Fault("POST", COMMIT, Cut("answer")))

    publication = publish(hub_api, folder, create_pr=True)

    assert publication.pull_request == "refs/pr/1"
    assert len(hub_api.list_repo_refs(REPO, include_pull_requests=True).pull_requests) == 1


@pytest.mark.distributed
def test_of_two_processes_that_publish_at_once_one_wins_and_the_other_hears_of_it(hub, hub_api, folder, tmp_path):
    target = open_repository(hub_api, REPO)
    script = tmp_path / "publish.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from huggingface_hub import HfApi\n"
        "from elm_trainer.hub.commit import commit_folder, open_repository\n"
        "from elm_trainer.hub.errors import ConflictError\n"
        "api, folder = HfApi(), Path(sys.argv[1])\n"
        f"target = open_repository(api, {REPO!r})\n"
        "Path(sys.argv[2]).touch()\n"
        "while not all((Path(sys.argv[2]).parent / f'ready-{n}').exists() for n in (0, 1)): pass\n"
        "try:\n"
        "    print('won', commit_folder(target, folder, message='At once').commit)\n"
        "except ConflictError as error:\n"
        "    print('lost', error)\n"
    )
    processes = []
    for number in (0, 1):
        own = tmp_path / f"folder-{number}"
        own.mkdir()
        (own / "report.json").write_text(f'{{"process": {number}}}')
        command = [sys.executable, str(script), str(own), str(tmp_path / f"ready-{number}")]
        environment = hub.env("hf_alice", tmp_path / f"home-{number}")
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=120)[0] for process in processes]

    assert sorted(text.split()[0] for text in printed) == ["lost", "won"]
    [winner] = [number for number, text in enumerate(printed) if text.startswith("won")]
    assert published(hub)["report.json"] == (tmp_path / f"folder-{winner}" / "report.json").read_bytes()
    assert hub.commits(REPO)[1].oid == target.head
