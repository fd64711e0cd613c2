"""Patterns of `.gitattributes` and `.gitignore`."""

import re


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a file is what git means by `pattern`, or lies in a folder that is.

    A pattern without a slash is for names in any folder; `*` stays within a folder, `**` does not.
    """
    pattern, folder_only = pattern.rstrip("/"), pattern.endswith("/")
    anywhere = "/" not in pattern
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern.lstrip("/"))
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = "".join(wild.get(piece, piece if piece.startswith("[") else re.escape(piece)) for piece in pieces)
    end = "/" if folder_only else "(?:/|$)"
    return re.match(("(?:.*/)?" if anywhere else "") + expression + end, path) is not None


def is_large_file(gitattributes: str, path: str) -> bool:
    """Whether `.gitattributes` sends `path` to the large file storage."""
    rules = (line.split() for line in gitattributes.splitlines() if line.strip() and not line.startswith("#"))
    return any("filter=lfs" in rule[1:] and pattern_matches(rule[0], path) for rule in rules)


def is_ignored(gitignore: str, path: str) -> bool:
    """Whether `.gitignore` leaves `path` out; later lines win."""
    ignored = False
    for line in (line.strip() for line in gitignore.splitlines()):
        if line and not line.startswith("#") and pattern_matches(line.lstrip("!"), path):
            ignored = not line.startswith("!")
    return ignored
