"""Faults of the Hub, at every request of a publication: overcome or named, the repository old or new, nothing lost."""

import re
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationAdd

from elm_trainer.hub import errors as failures
from elm_trainer.hub.commit import commit_folder, open_repository, read_text
from elm_trainer.hub.errors import ConflictError, HubError, NotSignedInError, PermissionDeniedError, UploadError
from elm_trainer.hub.info import PUBLISHED_FILES
from tests.hub_server import Answer, Behavior, Call, Corrupt, Cut, Damage, Disconnected, Fault, Slow, Truncate


REPO = "alice/erased"
MINE = "Publish the erased adapter"
COMMIT, BATCH, VERIFY = "/commit/", "/info/lfs/objects/batch", "/lfs/objects/verify"
PUT, PRE, REFS, TREE, README = "/uploads/", "/preupload/", "/refs", "/tree/", "/resolve/.*README"
INFO = "/api/models/alice/erased"


class CutAfter(Behavior):
    """Cuts the connection once the work is done and something else has happened."""

    def __init__(self, hook):
        self.hook = hook

    def after(self, response):
        self.hook()
        raise Disconnected


@pytest.fixture
def waits(monkeypatch, client_waits):
    """Seconds that this package would have waited; neither it nor the client waits."""
    waits = []

    def sleep(seconds):
        assert 0 <= seconds <= failures.LONGEST_WAIT
        waits.append(seconds)

    monkeypatch.setattr(failures, "time", SimpleNamespace(sleep=sleep))
    return waits


def publish(api, folder, message=MINE, **options):
    target = open_repository(api, REPO)
    read_text(target, "README.md")
    return commit_folder(target, folder, message=message, owned=PUBLISHED_FILES, **options)


def held(hub, revision="main"):
    return {name: data for name, data in hub.files(REPO, revision).items() if name != ".gitattributes"}


def local(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change(folder, number=2):
    """Another version of the folder: a text and the weights changed, a picture added."""
    (folder / "report.json").write_text(f'{{"figure": {number}}}')
    (folder / "adapter_model.safetensors").write_bytes(b"others!" * 1000 + str(number).encode())
    (folder / "report.png").write_bytes(b"\x89PNG" + bytes([number % 256]))


def status(method, path, code, times=1, skip=0, **headers):
    return [
        Fault(
            method, path, Answer(code, {name.replace("_", "-"): value for name, value in headers.items()}), times, skip
        )
    ]


def then(method, path, behavior, times=1, skip=0):
    return [Fault(method, path, behavior, times, skip)]


# Faults by request, and the error they may end in; `None` where they must be overcome.
FAULTS = {
    "upload cut": (lambda: then("PUT", PUT, Cut("request")), None),
    "upload cut before": (lambda: then("PUT", PUT, Cut("before"), 2), None),
    "upload's answer cut": (lambda: then("PUT", PUT, Cut("answer")), None),
    "upload 429": (lambda: status("PUT", PUT, 429, Retry_After="1"), None),
    "upload 500 twice": (lambda: status("PUT", PUT, 500, 2), None),
    "upload 500 always": (lambda: status("PUT", PUT, 500, 999), UploadError),
    "upload 403, the signature expired": (lambda: status("PUT", PUT, 403, 999), PermissionDeniedError),
    "upload stored wrong": (lambda: then("PUT", PUT, Damage(), 9), UploadError),
    "batch 429": (lambda: status("POST", BATCH, 429, Retry_After="1"), None),
    "batch 503 twice": (lambda: status("POST", BATCH, 503, 2), None),
    "batch 500 always": (lambda: status("POST", BATCH, 500, 999), UploadError),
    "batch of another form": (lambda: status("POST", BATCH, 200, 9), UploadError),
    "batch cut off": (lambda: then("POST", BATCH, Truncate(9, consistent=True), 9), UploadError),
    "batch of another file": (lambda: then("POST", BATCH, Corrupt(50), 9), UploadError),
    "verify 500": (lambda: status("POST", VERIFY, 500), None),
    "verify 500 always": (lambda: status("POST", VERIFY, 500, 999), UploadError),
    "verify 404": (lambda: status("POST", VERIFY, 404, 999), UploadError),
    "preupload 500 thrice": (lambda: status("POST", PRE, 500, 3), None),
    "preupload 500 always": (lambda: status("POST", PRE, 500, 999), UploadError),
    "preupload 401": (lambda: status("POST", PRE, 401, 9), NotSignedInError),
    "preupload of another form": (lambda: status("POST", PRE, 200, 9), UploadError),
    "preupload cut off": (lambda: then("POST", PRE, Truncate(9, consistent=True), 9), UploadError),
    "preupload cut": (lambda: then("POST", PRE, Cut("before"), 2), None),
    "commit 400": (lambda: status("POST", COMMIT, 400, 99), HubError),
    "commit 401": (lambda: status("POST", COMMIT, 401, 99), NotSignedInError),
    "commit 403": (lambda: status("POST", COMMIT, 403, 99), PermissionDeniedError),
    "commit 404": (lambda: status("POST", COMMIT, 404, 99), HubError),
    "commit 408": (lambda: status("POST", COMMIT, 408), None),
    "commit 409": (lambda: status("POST", COMMIT, 409), ConflictError),
    "commit 412": (lambda: status("POST", COMMIT, 412), ConflictError),
    "commit 413": (lambda: status("POST", COMMIT, 413, 99), HubError),
    "commit 422": (lambda: status("POST", COMMIT, 422, 99), HubError),
    "commit 429": (lambda: status("POST", COMMIT, 429, RateLimit='"api";r=0;t=1'), None),
    "commit 500 thrice": (lambda: status("POST", COMMIT, 500, 3), None),
    "commit 500 always": (lambda: status("POST", COMMIT, 500, 99), UploadError),
    "commit 502": (lambda: status("POST", COMMIT, 502), None),
    "commit 507": (lambda: status("POST", COMMIT, 507, 99), HubError),
    "commit 520": (lambda: status("POST", COMMIT, 520), None),
    "commit 524": (lambda: status("POST", COMMIT, 524), None),
    "commit answered in another form": (lambda: status("POST", COMMIT, 200), None),
    "commit always answered in another form": (lambda: status("POST", COMMIT, 200, 99), UploadError),
    "commit made, answer in half": (lambda: then("POST", COMMIT, Truncate(9, consistent=True)), None),
    "commit cut before": (lambda: then("POST", COMMIT, Cut("before"), 3), None),
    "commit cut within": (lambda: then("POST", COMMIT, Cut("request"), 2), None),
    "commit made, answer cut": (lambda: then("POST", COMMIT, Cut("answer")), None),
    "commit made, answer cut, history 500 twice": (
        lambda: then("POST", COMMIT, Cut("answer")) + status("GET", "/commits/", 500, 2), None,
    ),
    "commit made, answer cut, tree 500 twice": (
        lambda: then("POST", COMMIT, Cut("answer")) + status("GET", TREE, 500, 2, skip=1), None,
    ),
    "commit slow": (lambda: then("POST", COMMIT, Slow(0.1)), None),
    "tree in drips": (lambda: then("GET", TREE, Slow(0.005, drip=40)), None),
    "tree cut": (lambda: then("GET", TREE, Cut("content")), None),
    "tree cut off": (lambda: then("GET", TREE, Truncate(10, consistent=True)), None),
    "tree always cut off": (lambda: then("GET", TREE, Truncate(10, consistent=True), 999), UploadError),
    "tree 404": (lambda: status("GET", TREE, 404), HubError),
    "tree 500 always": (lambda: status("GET", TREE, 500, 999), UploadError),
    "references 500 twice": (lambda: status("GET", REFS, 500, 2), None),
    "references of another form": (lambda: status("GET", REFS, 200), None),
    "references always of another form": (lambda: status("GET", REFS, 200, 99), UploadError),
    "description of another form": (lambda: status("GET", f"{INFO}$", 200), None),
    "description cut": (lambda: then("GET", INFO, Cut("before"), 2), None),
    "description cut off": (lambda: then("GET", INFO, Truncate(10, consistent=True)), None),
    "description 401": (lambda: status("GET", INFO, 401, 99), NotSignedInError),
    "everything 401": (lambda: status("*", "/api/", 401, 99), NotSignedInError),
    "no wait named as a date": (
        lambda: status("POST", COMMIT, 429, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"), None,
    ),
    "a negative wait": (lambda: status("POST", COMMIT, 503, Retry_After="-5"), None),
    "a wait in superscript": (lambda: status("POST", COMMIT, 503, Retry_After="\xb2"), None),
    "a wait in superscript, read by the client": (lambda: status("GET", TREE, 503, Retry_After="\xb2"), None),
    "a day to wait": (lambda: status("POST", COMMIT, 503, Retry_After="86400"), None),
    "a day to wait, read by the client": (lambda: status("POST", PRE, 503, Retry_After="86400"), None),
    "a day to wait by the rate": (lambda: status("POST", BATCH, 429, RateLimit='"api";r=0;t=86400'), None),
    "a million years to wait": (lambda: status("POST", COMMIT, 503, Retry_After="100000000000000"), None),
    "card cut short": (lambda: then("GET", README, Truncate(1), 1), None),
    "card stored short": (lambda: then("GET", README, Truncate(1, consistent=True), 9), UploadError),
    "card corrupt": (lambda: then("GET", README, Corrupt(2)), None),
    "card 500": (lambda: status("*", README, 500, 5), None),
    "card 403": (lambda: status("*", README, 403, 99), PermissionDeniedError),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_overcome_or_named_and_the_repository_is_old_or_new(
    name, hub, hub_api, folder, waits, client_waits, caplog, tmp_path
):
    publish(hub_api, folder, "First")
    old = held(hub)
    change(folder)
    new = local(folder)
    make, expected = FAULTS[name]
    faults = make()
    for fault in faults:
        hub.fail(fault)

    error = None
    try:
        publication = publish(hub_api, folder)
    except HubError as caught:
        error = caught

    assert all(fault.skip == 0 and fault.times != 1 or fault.times == 0 for fault in faults)  # each was met
    if expected is None:
        assert error is None
        assert held(hub) == new
        assert publication.commit == hub.head(REPO) and hub.commits(REPO)[0].title == MINE
        assert len(hub.commits(REPO)) == 3  # never twice
    else:
        assert type(error) is expected
        assert expected is HubError or re.search("run `hf auth login`|publish", str(error))
        assert held(hub) == old
        assert not re.search(r"signature|X-Amz", str(error))
    assert local(folder) == new
    assert max([0, *client_waits]) <= failures.LONGEST_WAIT + 1
    if "a day" in name:
        assert "The Hub asks to wait 86400 s: waiting 300 s." in caplog.text


def test_there_are_enough_faults():
    assert len(FAULTS) >= 60


@pytest.mark.parametrize("theirs", ["notes.txt", "README.md", "report.json"])
@pytest.mark.parametrize("tag", [None, "v1"])
def test_ones_own_commit_is_found_below_somebody_elses(theirs, tag, hub, hub_api, folder, waits):
    publish(hub_api, folder, "First")
    change(folder)

    def other():
        hub_api.create_commit(REPO, [CommitOperationAdd(theirs, b"theirs")], commit_message=MINE)

    hub.fail(Fault("POST", COMMIT, CutAfter(other)))

    publication = publish(hub_api, folder, tag=tag)

    others, mine, *_ = hub.commits(REPO)
    assert publication.commit == mine.oid != others.oid and publication.changed
    assert held(hub, mine.oid) == local(folder)
    if tag:
        assert hub.head(REPO, tag) == mine.oid


def _touch(api, folder):
    return [CommitOperationAdd("notes.txt", b"theirs")]


def _the_same_files_and_one_more(api, folder):
    return [CommitOperationAdd(name, data) for name, data in local(folder).items()] + _touch(api, folder)


def _the_same(api, folder):
    return [CommitOperationAdd(name, data) for name, data in local(folder).items()]


@pytest.mark.parametrize("what", [_touch, _the_same_files_and_one_more, _the_same])
@pytest.mark.parametrize("when", ["before the commit", "in place of the commit"])
def test_somebody_elses_commit_is_never_taken_for_ones_own(what, when, hub, hub_api, folder, waits):
    publish(hub_api, folder, "First")
    change(folder)
    made = []

    def other():
        made.append(hub_api.create_commit(REPO, what(hub_api, folder), commit_message="Theirs").oid)

    if when == "before the commit":
        hub.fail(Fault("POST", PRE, Call(other)))
    else:
        hub.fail(Fault("POST", COMMIT, Call(other)))
        hub.fail(Fault("POST", COMMIT, Cut("before"), skip=1))

    with pytest.raises(ConflictError, match="publish again"):
        publish(hub_api, folder, tag="v1")

    assert hub.head(REPO) == made[0]
    assert not hub_api.list_repo_refs(REPO).tags


def test_a_commit_that_lands_after_it_was_looked_for_is_found_when_it_is_tried_again(hub, hub_api, folder, waits):
    publish(hub_api, folder, "First")
    head = hub.head(REPO)
    change(folder)

    def late():  # the first attempt, which took the Hub long
        operations = [CommitOperationAdd(name, data) for name, data in local(folder).items()]
        hub_api.create_commit(REPO, operations, commit_message=MINE, parent_commit=head)

    hub.fail(Fault("POST", COMMIT, Cut("request")))
    hub.fail(Fault("POST", COMMIT, Call(late)))

    publication = publish(hub_api, folder)

    assert publication.commit == hub.head(REPO) and len(hub.commits(REPO)) == 3


def test_whether_a_commit_was_made_is_left_open_where_nobody_can_be_asked(hub, hub_api, folder, waits):
    publish(hub_api, folder, "First")
    change(folder)
    hub.fail(Fault("POST", COMMIT, Cut("answer")))
    hub.fail(Fault("GET", "/commits/", Answer(500), times=99))

    with pytest.raises(UploadError, match="not whether it was made.*publish again, which looks for it first"):
        publish(hub_api, folder)

    head = hub.head(REPO)
    assert publish(hub_api, folder).commit == head and len(hub.commits(REPO)) == 3


def test_a_commit_that_cannot_be_looked_at_again_is_named_as_made(hub, hub_api, folder, waits):
    publish(hub_api, folder, "First")
    change(folder)
    hub.fail(Fault("GET", TREE, Answer(404), times=99, skip=1))

    with pytest.raises(
        HubError, match="holds what was sent as commit [0-9a-f]{40}, but it could not be compared"
    ) as told:
        publish(hub_api, folder)

    assert hub.head(REPO) in str(told.value) and held(hub) == local(folder)


@pytest.mark.parametrize(
    ("answer", "times"), [(Answer(500), 4), (Answer(403), 1), (Answer(404), 1), (Cut("before"), 4)]
)
def test_a_tag_that_fails_says_that_the_commit_was_made_and_how_to_set_it(answer, times, hub, hub_api, folder, waits):
    hub.fail(Fault("POST", "/tag/", answer, times))

    with pytest.raises(HubError) as told:
        publish(hub_api, folder, tag="v1")

    head, message = hub.head(REPO), str(told.value)
    assert f"commit {head}" in message and "is unchanged" not in message
    left = re.search(r"create_tag\((.*)\)`", message)[1]
    eval(f"api.create_tag({left})", {"api": hub_api})  # what the message says
    assert hub.head(REPO, "v1") == head


def test_a_tag_that_somebody_else_set_meanwhile_is_not_taken_for_ones_own(hub, hub_api, folder, waits):
    first = publish(hub_api, folder, "First").commit
    change(folder)
    hub.fail(Fault("POST", "/tag/", Call(lambda: hub_api.create_tag(REPO, tag="v1", revision=first))))

    with pytest.raises(ConflictError, match=r"as commit [0-9a-f]{40}, but the tag 'v1' is on .* choose another"):
        publish(hub_api, folder, tag="v1")

    assert hub.head(REPO, "v1") == first and held(hub) == local(folder)


def test_a_file_that_the_repository_ignores_is_named_before_anything_is_committed(hub, hub_api, folder, waits):
    hub_api.create_repo(REPO)
    hub_api.upload_file(path_or_fileobj=b"*.json\n", path_in_repo=".gitignore", repo_id=REPO)
    old = held(hub)

    with pytest.raises(ValueError, match="`.gitignore` of alice/erased leaves out report.json"):
        publish(hub_api, folder)

    assert held(hub) == old


def test_a_card_that_is_no_text_is_named(hub, hub_api, folder, waits, tmp_path):
    (tmp_path / "card").write_bytes(b"\xff\xfe")
    hub.add_model(REPO, {"README.md": tmp_path / "card"})

    with pytest.raises(ValueError, match="README.md of alice/erased is not text in UTF-8.*publish again"):
        publish(hub_api, folder)
