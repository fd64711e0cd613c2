"""Paths of a machine or a site in a text, and addresses of storage."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from .tokens import Hit


# Folders at the root of a file system in which people, groups and jobs keep their files; any with a number or a suffix too.
_ROOTS = (
    "home", "homes", "Users", "users", "user", "mnt", "media", "srv", "private", "Volumes", "workspaces", "work",
    "scratch", "gscratch", "data", "datasets", "gpfs", "lustre", "lfs", "beegfs", "pfs", "panfs", "ceph", "cephfs", "weka",
    "vast", "nfs", "afs", "fs", "fsx", "efs", "eos", "export", "exports", "net", "project", "projects", "proj", "group", "groups",
    "lab", "labs", "shared", "share", "nobackup", "store", "storage", "archive", "archives", "cluster", "hpc", "raid", "ssd",
    "nvme", "hdd", "disk", "disks", "vol", "volume", "volumes", "tank", "pool", "zfs", "backup", "backups", "cfs", "global",
    "gws", "orange", "blue", "ptmp", "flash", "fast", "bulk", "local_scratch", "localscratch", "checkpoint", "checkpoints",
    "mount", "nas", "san", "das", "remote", "team", "teams", "corp", "bigdata", "experiments", "jfs", "juicefs", "glusterfs",
    "gluster", "grid", "tier", "p", "capstor", "iopsstor", "leonardo_work", "leonardo_scratch", "users_home", "hdfs", "lscratch",
)  # fmt: skip
# What each system has, or a container or a notebook of anybody: it says nothing of whose machine it is.
_SAYS_NOTHING = frozenset(
    "bin sbin dev lib lib32 lib64 libx32 proc sys boot root etc usr opt var run tmp app content kaggle workspace code "
    "models model input output inputs outputs src repo docs api static System Applications Library snap lost+found cdrom".split()
)
# Files of texts, models and settings, by which a path is told from the path of an address.
_FILES = r"jsonl|parquet|arrow|safetensors|gguf|ckpt|pth?|npz|npy|h5|feather|sqlite|slurm|sbatch|err|out|log"
# Parts of the Hub's addresses.
_OF_THE_HUB = r"resolve|blob|tree|raw|api|docs|spaces|models|v\d|static|assets|org|files|download"
_OF_CLUSTERS = r"\w{0,12}(?:gpfs|lustre|beegfs|scratch|ceph|panfs|weka|nobackup)[\w-]{0,20}|project[\w-]{0,20}"
_STORAGE = frozenset(
    "s3 s3a s3n gs gcs abfs abfss wasb wasbs adl az azure hdfs webhdfs viewfs dbfs oss cos cosn obs bos tos swift r2 b2 oci"
    " minio alluxio lakefs juicefs jfs lustre ceph rados smb cifs nfs afp sftp scp rsync file".split()
)
_ADDRESS = re.compile(r"://+(?=([\w~.$%{<\[-][^\s\"'`<>|,;)]{1,80}))")
_SCHEME = re.compile(r"(?<![\w+.-])[a-z][a-z0-9+.-]*$")
# The literal at the start of each pattern is what makes it quick. What stands before keeps addresses, relative paths,
# "and/or" and closing tags out; an option's letter, as in -I, does not.
_PART = r"[\w.@+~%{}-]"
_START = r"(?<![\w./\\~<>}\])*$%?&=-]/)"
_BACKSLASHES = (
    re.compile(r":(?<=\b[A-Za-z]:)(?<![\w?]\w:)\\+(?![nrt](?:[A-Z\d]|\b))\w[\w .$()-]{0,100}\\+[\w.$-]{1,100}"),
    re.compile(r"\\\\(?<![\\\w]\\\\)\w[\w.-]{1,60}\\[A-Za-z_$][\w.$-]{1,60}(?!\\\\)"),
)
_PLACEHOLDER = re.compile(
    r"://?/?[<${\[]|://(?:my|your|some|the|example|bucket|container|path|host)\b|/path/to\b|\\path\\to\b"
)
_GENERIC_FOLDER = re.compile(r"[A-Za-z]:[\\/]+(?:Program|Windows|Temp|tmp|path|Python)", re.IGNORECASE)
_LATEX = re.compile(
    r"\\(?:to|in|rightarrow|longrightarrow|mapsto|math\w+|subset\w*|times|frac|cdot|left|right|Omega|alpha|begin|end)(?![a-z])"
)


def find_paths(text: str, *, escaped: bool = False) -> Iterator[Hit]:
    """Each path in a text that says where on whose machine, or in whose storage, something lies.

    Paths that each system has, such as `/etc/passwd`, `/tmp/notes.txt` or `C:\\Program Files`, are none.

    Args:
        text (`str`): The text.
        escaped (`bool`, *optional*, defaults to `False`): Whether backslashes in it begin escapes, and no part of a path.
    """
    patterns = _patterns(str(Path.home()), str(Path.cwd()))
    for pattern in patterns if escaped else (*patterns, *_BACKSLASHES):
        for match in pattern.finditer(text):
            # A drive's letter stands before the colon that the pattern starts with.
            start = match.start() - (match[0][0] == ":")
            if not _says_nothing(text[start : match.end()], text[text.rfind("\n", 0, start) + 1 :][:400]):
                yield Hit(start, match.end(), "an absolute path of a machine")
    for match in _ADDRESS.finditer(text):
        scheme = _SCHEME.search(text[max(0, match.start() - 10) : match.start()].lower())
        if scheme and scheme[0] in _STORAGE and not _says_nothing(match[0] + match[1], ""):
            yield Hit(match.start() - len(scheme[0]), match.end(1), "an address of storage")


def _says_nothing(found: str, line: str) -> bool:
    if "{" in found or _PLACEHOLDER.search(found) or _GENERIC_FOLDER.match(found):
        return True
    return "\\" in found and _LATEX.search(line.partition("\n")[0]) is not None


@lru_cache(maxsize=8)
def _patterns(home: str, folder: str) -> list[re.Pattern[str]]:
    """Paths with slashes: below the roots that are known, of files of data, and of this process."""
    here = {entry.name for entry in os.scandir("/") if entry.is_dir()} - _SAYS_NOTHING
    roots = "|".join(map(re.escape, sorted({*_ROOTS, *here}, key=len, reverse=True)))
    passed = "|".join(sorted(_SAYS_NOTHING - {"models", "model"}))
    patterns = [
        rf"/(?:{_START}|(?<=\s-[A-Za-z]/))(?:(?:{roots})(?:[_-]?\d[\w-]*|[_-]\w+)?|{_OF_CLUSTERS})/+{_PART}{{1,200}}(?:/{_PART}{{0,200}}){{0,40}}",
        rf"/{_START}root/(?!\.cache\b|\.config\b|\.local\b){_PART}{{1,200}}",
        rf"/{_START}(?!(?:{passed}|{_OF_THE_HUB})/)[\w.-]{{1,40}}(?:/[\w.-]{{1,100}}){{1,20}}\.(?:{_FILES})\b",
        rf"~(?<![\w./\\~=$)\]]~)[a-z_][a-z0-9_-]{{1,31}}/{_PART}{{1,100}}",
        rf"~(?<![\w./\\~)\]]~)/(?!\.){_PART}{{1,100}}",
        r":(?<=\b[A-Za-z]:)(?<![\w?+./-]\w:)/(?!/)\w[\w .$-]{0,100}(?:/\w|(?<=\w\w\w))",
        # A share of Windows, with the slashes of other systems.
        r"//(?<![\w:/.*#\"'\\<]//)(?=[\w-]{0,40}[\d-]|nas|file|server|share)[A-Za-z][\w-]{1,40}/[A-Za-z][\w$-]{1,40}/\w",
    ]
    own = {home, folder, sys.prefix, tempfile.gettempdir()}
    if deep := [path.removeprefix("/") for path in own if len(Path(path).parts) > 2]:
        patterns.append(rf"/{_START}(?:{'|'.join(map(re.escape, sorted(deep, key=len, reverse=True)))})(?![\w-])")
    return [re.compile(pattern) for pattern in patterns]
