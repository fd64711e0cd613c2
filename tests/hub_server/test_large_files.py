import socket
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import BadRequestError
from huggingface_hub.utils import get_session

from .faults import Answer, Cut, Damage, Fault
from .fixtures import ALICE
from .server import HubServer


PART = 1000


@pytest.fixture
def small_parts(hub, hub_api) -> HubServer:
    """The Hub, with files going up in parts of 1000 bytes from 3000 bytes on."""
    hub.state.multipart_from, hub.state.part_size = 3 * PART, PART
    hub_api.create_repo("alice/a")
    return hub


def add(api: HfApi, path: str, content: bytes) -> None:
    api.create_commit("alice/a", [CommitOperationAdd(path, content)], commit_message=f"add {path}")


def asked(hub: HubServer, method: str, path: str) -> int:
    return sum(seen.method == method and path in seen.path for seen in hub.requests)


@pytest.mark.parametrize(
    ("path", "content", "large"),
    [
        ("weights.safetensors", b"text", True),  # by name
        ("picture.png", b"\x89PNG\x00\xff", True),  # by content
        ("notes.txt", "é".encode() * 300, False),  # a character is cut at the end of the sample
        ("latin1.txt", b"caf\xe9 au lait", True),  # not UTF-8
        ("empty.bin", b"", False),
        ("long.txt", b"a" * (10 * 1024 * 1024 + 1), True),  # by size
    ],
)
def test_name_content_and_size_decide_what_is_a_large_file(hub, hub_api, path, content, large):
    hub_api.create_repo("alice/a")

    add(hub_api, path, content)

    assert hub.files("alice/a")[path] == content
    assert (hub.commits("alice/a")[0].files[path].sha256 is not None) is large


def test_git_attributes_learn_about_other_large_files(hub, hub_api):
    hub_api.create_repo("alice/a")

    add(hub_api, "pictures/report.png", b"\x89PNG\x00\xff")
    add(hub_api, "weights.safetensors", b"text")

    lines = hub.files("alice/a")[".gitattributes"].decode().splitlines()
    assert lines[-1] == "pictures/report.png filter=lfs diff=lfs merge=lfs -text"


def test_a_small_large_file_goes_up_as_a_whole(small_parts, hub_api):
    add(hub_api, "a.bin", b"x" * (3 * PART - 1))

    assert (asked(small_parts, "PUT", "/uploads/"), asked(small_parts, "POST", "/api/complete_multipart/")) == (1, 0)
    assert asked(small_parts, "POST", "/objects/verify/") == 1


def test_a_large_large_file_goes_up_in_parts(small_parts, hub_api):
    content = bytes(range(250)) * 17  # five parts, the last one shorter

    add(hub_api, "a.bin", content)

    assert (asked(small_parts, "PUT", "/uploads/"), asked(small_parts, "POST", "/api/complete_multipart/")) == (5, 1)
    assert small_parts.files("alice/a")["a.bin"] == content


def test_what_is_there_is_not_sent_again(small_parts, hub_api):
    add(hub_api, "a.bin", b"same")
    add(hub_api, "b.bin", b"same")

    assert asked(small_parts, "PUT", "/uploads/") == 1
    assert small_parts.files("alice/a")["b.bin"] == b"same"


def test_what_another_repository_has_must_be_sent(small_parts, hub_api):
    hub_api.create_repo("alice/b")
    add(hub_api, "a.bin", b"same")

    hub_api.create_commit("alice/b", [CommitOperationAdd("b.bin", b"same")], commit_message="m")

    assert asked(small_parts, "PUT", "/uploads/") == 2


@pytest.mark.parametrize("size", [PART, 5 * PART])
def test_a_file_that_was_stored_wrong_is_noticed_and_never_committed(small_parts, hub_api, size):
    small_parts.fail(Fault("PUT", "/uploads/", Damage()))

    with pytest.raises(RuntimeError, match="Error while uploading 'a.bin'") as caught:
        add(hub_api, "a.bin", b"x" * size)

    assert "wrong size or SHA-256" in str(caught.value.__cause__)
    assert len(small_parts.commits("alice/a")) == 1
    add(hub_api, "a.bin", b"x" * size)
    assert small_parts.files("alice/a")["a.bin"] == b"x" * size


@pytest.mark.parametrize("address", ["/api/complete_multipart/", "/objects/verify/", "/uploads/.*/2$"])
def test_a_step_whose_answer_was_lost_can_be_repeated(small_parts, hub_api, client_waits, address):
    small_parts.fail(Fault("*", address, Cut("answer")))
    content = bytes(range(250)) * 17

    add(hub_api, "a.bin", content)

    assert (small_parts.files("alice/a")["a.bin"], client_waits) == (content, [1])


def test_an_upload_that_was_given_up_leaves_nothing(small_parts, hub_api):
    small_parts.fail(Fault("PUT", "/uploads/", Answer(400)))
    with pytest.raises(RuntimeError):
        add(hub_api, "a.bin", b"content")
    upload = next(seen for seen in small_parts.requests if seen.method == "PUT")
    storage = urlsplit(small_parts.storage_endpoint)

    with socket.create_connection((storage.hostname, storage.port)) as connection:
        connection.sendall(f"PUT {upload.path}?{upload.query} HTTP/1.1\r\nContent-Length: 7\r\n\r\ncon".encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(100)

    verified = get_session().post(
        f"{small_parts.endpoint}/alice/a.git/info/lfs/objects/verify/{upload.path.rpartition('/')[2]}",
        headers={"Authorization": f"Bearer {ALICE}"},
    )
    assert (answer, verified.status_code) == (b"", 404)
    assert "was not uploaded" in verified.json()["error"]


def test_parts_that_were_not_uploaded_do_not_make_a_file(small_parts, hub_api):
    small_parts.fail(Fault("POST", "/api/complete_multipart/", Answer(400)))
    with pytest.raises(RuntimeError):
        add(hub_api, "a.bin", b"x" * 4 * PART)
    asked_for = next(seen for seen in small_parts.requests if "complete_multipart" in seen.path)

    response = get_session().post(
        f"{small_parts.endpoint}{asked_for.path}?{asked_for.query}",
        json={"oid": "", "parts": [{"partNumber": 1, "etag": "0"}]},
    )

    assert (response.status_code, "not those that were uploaded" in response.json()["error"]) == (400, True)


def test_a_commit_cannot_point_to_a_file_that_was_not_uploaded(small_parts, hub_api):
    operation = CommitOperationAdd("a.bin", b"never sent")
    operation._upload_mode, operation._is_uploaded = "lfs", True

    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        hub_api.create_commit("alice/a", [operation], commit_message="m")


def test_the_storage_takes_and_gives_only_what_the_hub_signed(small_parts, hub_api):
    add(hub_api, "a.bin", b"content")
    sha256 = small_parts.commits("alice/a")[0].files["a.bin"].sha256
    address = f"{small_parts.storage_endpoint}/objects/{sha256}"
    location = get_session().head(f"{small_parts.endpoint}/alice/a/resolve/main/a.bin", follow_redirects=False)
    signed = location.headers["Location"]

    unsigned = get_session().get(address)
    with_token = get_session().get(signed, headers={"Authorization": f"Bearer {ALICE}"})

    assert (unsigned.status_code, with_token.status_code) == (403, 400)
    assert get_session().get(signed).content == b"content"
