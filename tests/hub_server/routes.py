"""Every address of the Hub and of its storage, with what answers it and what the client wants there."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import unquote

from . import accounts, commits, discussions, files, lfs, refs, repositories
from .messages import Request, Response
from .state import State


Handler = Callable[[State, Request], Response]

# `{repo}` is namespace/name; what else stands in braces is a piece without a slash, unless a star follows.
PIECES = {
    "{kind}": "(?P<kind>models|datasets)",
    "{prefix}": "(?P<prefix>datasets/)?",
    "{repo}": "(?P<repo>[^/]+/[^/]+)",
}
API = "/api/{kind}/{repo}"


@dataclass(frozen=True)
class Route:
    """An address.

    Args:
        method (`str`): `GET` answers `HEAD` too.
        path (`str`): With names in braces for what varies.
        handler (`Handler`): What answers.
        purpose (`str`): What the client wants there.
        origin (`str`, *optional*, defaults to `"hub"`): `"hub"` or `"storage"`.
        slow (`bool`, *optional*, defaults to `False`): Whether it handles large files: the lock is not held then.
    """

    method: str
    path: str
    handler: Handler
    purpose: str
    origin: str = "hub"
    slow: bool = False

    @cached_property
    def expression(self) -> re.Pattern[str]:
        pieces = re.split(r"(\{\w+\*?\})", self.path)
        named = [PIECES.get(piece) or re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", piece) for piece in pieces]
        return re.compile("".join(re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", piece) for piece in named))

    def match(self, request: Request) -> dict[str, str] | None:
        """What the path says where the route has names, or `None` if the request is not for this route."""
        method = "GET" if request.method == "HEAD" else request.method
        found = self.expression.fullmatch(request.path)
        if not found or (method, request.origin) != (self.method, self.origin):
            return None
        args = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
        return args | ({"kind": args["prefix"]} if "prefix" in args else {})


ROUTES = (
    Route("GET", "/api/whoami-v2", accounts.whoami, "`whoami`: name, organisations, role of the token"),
    Route("POST", "/api/validate-yaml", accounts.validate_yaml, "metadata of a card, before `create_commit`"),
    Route("GET", "/api/agent-harnesses", accounts.agent_harnesses, "list of programs that the user agent may name"),
    Route("POST", "/api/repos/create", repositories.create, "`create_repo`"),
    Route("DELETE", "/api/repos/delete", repositories.delete, "`delete_repo`"),
    Route("GET", "/api/{kind}", repositories.list_repos, "`list_models`, `list_datasets`"),
    Route("GET", API, repositories.info, "`model_info`, `dataset_info`, `repo_info`"),
    Route("GET", API + "/revision/{revision}", repositories.info, "the same at a revision"),
    Route("PUT", API + "/settings", repositories.change_settings, "`update_repo_settings`"),
    Route("GET", API + "/auth-check", repositories.check_access, "`auth_check`"),
    Route("GET", API + "/auth-check/write", repositories.check_write_access, "`auth_check(write=True)`"),
    Route("GET", API + "/tree/{revision}", files.list_tree, "`list_repo_tree`, `snapshot_download`"),
    Route("GET", API + "/tree/{revision}/{path*}", files.list_tree, "the same for a folder"),
    Route("POST", API + "/paths-info/{revision}", files.paths_info, "`get_paths_info`, `HfFileSystem`"),
    Route("GET", API + "/refs", refs.list_refs, "`list_repo_refs`"),
    Route("GET", API + "/commits/{revision}", refs.list_commits, "`list_repo_commits`"),
    Route("POST", API + "/branch/{branch}", refs.create_branch, "`create_branch`"),
    Route("DELETE", API + "/branch/{branch}", refs.delete_branch, "`delete_branch`"),
    Route("POST", API + "/tag/{revision}", refs.create_tag, "`create_tag`"),
    Route("DELETE", API + "/tag/{tag}", refs.delete_tag, "`delete_tag`"),
    Route(
        "POST", API + "/preupload/{revision}", commits.preupload, "`create_commit`: is a file large, known, ignored?"
    ),
    Route("POST", API + "/commit/{revision}", commits.commit, "`create_commit`: the commit, or a pull request"),
    Route("GET", API + "/discussions", discussions.list_discussions, "`get_repo_discussions`"),
    Route("POST", API + "/discussions", discussions.create_discussion, "`create_discussion`, `create_pull_request`"),
    Route("GET", API + "/discussions/{num}", discussions.show_discussion, "`get_discussion_details`"),
    Route("POST", API + "/discussions/{num}/merge", discussions.merge_pull, "`merge_pull_request`"),
    Route("POST", API + "/discussions/{num}/status", discussions.change_status, "`change_discussion_status`"),
    Route(
        "GET", "/{prefix}{repo}/resolve/{revision}/{path*}", files.resolve, "`hf_hub_download`: metadata and content"
    ),
    Route(
        "POST", "/{prefix}{repo}.git/info/lfs/objects/batch", lfs.batch, "`create_commit`: where do large files go?"
    ),
    Route(
        "POST",
        "/{prefix}{repo}.git/info/lfs/objects/verify/{key}",
        lfs.verify,
        "a large file has arrived whole",
        slow=True,
    ),
    Route("POST", "/api/complete_multipart/{key}", lfs.complete, "all parts of a large file were sent", slow=True),
    Route("PUT", "/uploads/{key}", lfs.put_whole, "a large file as a whole (`basic`)", "storage", slow=True),
    Route("PUT", "/uploads/{key}/{part}", lfs.put_part, "a part of a large file (`multipart`)", "storage", slow=True),
    Route("GET", "/objects/{sha256}", lfs.get_object, "content of a large file, whole or a range", "storage"),
)
