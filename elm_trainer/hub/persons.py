"""What leads to a person or a machine in a text: addresses, numbers, names, paths, storage addresses."""

import getpass
import ipaddress
import os
import re
import socket
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path

from .tokens import Hit


_TAKE_OUT = "take it out"
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

    Paths that each system has, such as `/etc/passwd`, `/tmp/notes.txt` or `C:\\Program Files`, do not count. With `escaped`
    backslashes begin escapes, and no part of a path.
    """
    patterns = _patterns(str(Path.home()), str(Path.cwd()))
    for pattern in patterns if escaped else (*patterns, *_BACKSLASHES):
        for match in pattern.finditer(text):
            # A drive's letter stands before the colon that the pattern starts with.
            start = match.start() - (match[0][0] == ":")
            if not _says_nothing(text[start : match.end()], text[text.rfind("\n", 0, start) + 1 :][:400]):
                yield Hit(start, match.end(), "an absolute path of a machine", "take it out or make it relative")
    end = -1
    for match in _ADDRESS.finditer(text):
        if match.start() < end:  # within the one before
            continue
        scheme = _SCHEME.search(text[max(0, match.start() - 10) : match.start()].lower())
        if scheme and scheme[0] in _STORAGE and not _says_nothing(match[0] + match[1], ""):
            end = match.end(1)
            yield Hit(match.start() - len(scheme[0]), end, "an address of storage", _TAKE_OUT)


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


_HOST = r"((?:[A-Za-z0-9-]{1,63}(?:\.|\s?[\[(]\s?dot\s?[\])]\s?)){1,6}[A-Za-z]{2,24})(?![\w-]|\.\w|:[\w./-])"
# From the @ on, which is what makes the search quick.
_MAILS = (re.compile(rf"@{_HOST}"), re.compile(rf"[\[(]\s?at\s?[\])]\s{{0,2}}{_HOST}"))
_MAILBOX = re.compile(r"(?<![\w.+%/-])[\w.+%-]{1,64}$")
_OF_NOBODY = re.compile(
    r"(?:git|hg|svn|ssh|no-?reply|donotreply|user(?:name)?|you|your[\w.-]*|name|email|e-mail|someone|somebody|me|foo|test|author)",
    re.IGNORECASE,
)
_HOSTS_OF_NOBODY = re.compile(
    r"(?:.*[.-])?(?:example|localhost|invalid|test|local|noreply|domain)(?:\.\w+)*|.*\.(?:png|jpe?g|gif|svg|webp|py|js|json|ts|css|so)",
    re.IGNORECASE,
)
# Digits, apart by what stands between the groups of a number. One that follows another, or a point or a dash, begins none:
# to try each of them would take 25 steps a digit in a long row.
_GROUPS = re.compile(r"\d(?<![\d.-]\d)(?:[ ().\-/\u2011\u00a0]{0,3}\d){6,24}(?![\w%]|[.,:]\d|-\w)")
_FIGURE = re.compile(r"\d*\.\d+")
_BEFORE_GROUPS = re.compile(r"(?<![\w.,:/+#=-])\+?\(?$")
_CALL = re.compile(
    r"(?:phone|mobile|\bcall|\bcell|\btel|\bt[ée]l|\bfax|fon\b|handy|whatsapp|signal|\bsms|\btext me|\breach|☎|📞)[\w ]{0,12}[.:]{0,2}[ (]{0,3}$",
    re.IGNORECASE,
)
_ACCOUNT = re.compile(
    r"(?:account|acct|konto|routing|sort[ -]code|compte|bank account)[\w ]{0,10}(?:number|no|nr|nummer|#)?[.:# =]{1,4}$",
    re.IGNORECASE,
)
_AMERICAN = re.compile(r"(?:\+?1[ .-]?)?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.-])[2-9]\d{2}[ .-]\d{4}")
_NATIONAL = re.compile(
    r"0[1-9]\d{1,4}[ /-]\d{3,8}(?:[ -]\d{2,5}){0,3}|0[1-9](?:[ .]\d\d){4}|\(0\d{2,4}\) ?\d[\d ]{5,9}"
)
_INTERNATIONAL = re.compile(r"(?:\+|00)[1-9][\d ().\-/\u2011\u00a0]+")
_SOCIAL = re.compile(r"(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}")
_CARDS = re.compile(
    r"(?:4\d{15}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[068]\d{12}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35\d{14}|62\d{14})"
)
_CARD_GROUPS = re.compile(r"\d+|\d{4}([ -])\d{4}\1\d{4}\1\d{2,4}|\d{4}([ -])\d{6}\2\d{4,5}")
_ISBN = re.compile(r"isbn[\w -]{0,8}[: ]{0,3}$", re.IGNORECASE)
_FIGURE_OR_DATE = re.compile(r"\+?\d*\.\d+|\d{4}[ .-]\d{4}|\d{4}[-./]\d\d?[-./]\d\d?.*|\d\d?[-./]\d\d?[-./]\d{4}.*")
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9][A-Z])[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?![A-Za-z0-9])")
_IPV4 = re.compile(r"(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})(?![\w-]|\.\w)")
# Of a company or a home, where the address is that of a machine in it.
_PRIVATE = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)
_VERSION = re.compile(
    r"(?:version|release|driver|section|chapter|==|>=|<=|~=|[<>^=]|\bv|cuda|§|build)[ :]{0,2}$", re.IGNORECASE
)
_COLONS = re.compile(r":[0-9a-fA-F]{0,4}:[0-9a-fA-F]{0,4}:")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{1,4}:{1,2}){3,7}[0-9a-fA-F]{1,4}(?![\w:])")

# Names of machines and accounts that many share.
_GENERIC_NAMES = frozenset(
    "root user users admin administrator nobody guest default test demo app dev build runner worker node master server"
    " host localhost localdomain local home ubuntu debian fedora centos alpine linux ec2-user azureuser opc pi vagrant"
    " docker container jovyan vscode codespace gitpod jenkins ci github gitlab-runner colab kaggle sagemaker-user model"
    " models base data train trainer python computer desktop laptop macbook workstation gpu cpu cuda none".split()
)
# Given names of more than five letters that a text may well mention; shorter ones are known by their shape.
_GIVEN_NAMES = frozenset(
    "michael alexander charlotte jennifer william elizabeth benjamin christopher matthew daniel andrew joseph joshua"
    " nicholas jonathan stephen patrick vincent victor martin thomas robert richard charles edward george samuel"
    " anthony gabriel sebastian dominic gregory philip phillip francis leonard russell raymond douglas harold arthur"
    " albert frederick theodore walter margaret katherine catherine victoria stephanie rebecca jessica melissa michelle"
    " patricia barbara dorothy eleanor florence beatrice josephine augusta juliet isabel isabella sophia olivia amelia"
    " violet autumn summer winter jasmine rosemary hannah rachel sandra sharon pamela claire juliette virginia carolina"
    " madison austin dallas houston boston camden jackson lincoln franklin washington hunter carter cooper parker taylor"
    " turner walker fisher gardner potter fletcher chandler spencer preston stanley stewart steward sterling".split()
)
_ONSET = (
    r"(?:[bcdfghjklmnpqrstvwxyz]|[bcfgpst][lr]|[dt]r|tw|dw|s[cklmnpqtw]|ch|sh|th|ph|wh|kn|wr|gn|st?r|s[pc]r|kr|kl|vl)?"
)
_READABLE = re.compile(rf"{_ONSET}(?:[aeiouy]+[bcdfghjklmnpqrstvwxz]{{0,3}})+e?")
_IDENTITY = r"(?:user(?:name)?|login|logname|author|owner|account|host(?:name)?|created[ _]by|run[ _]name|entity)[\"']?\s{0,3}[:=]\s{0,3}[\"']?"


def find_persons(text: str) -> Iterator[Hit]:
    """E-mail addresses, telephone numbers, IP addresses, and numbers of cards and accounts.

    Addresses and numbers that are set aside for documentation, and those of no machine in particular, do not count.
    """
    for match in chain.from_iterable(pattern.finditer(text) for pattern in _MAILS):
        before = text[max(0, match.start() - 66) : match.start()].rstrip(" ")
        box, host = _MAILBOX.search(before), match[1]
        if box and not (
            _OF_NOBODY.fullmatch(box[0]) or _HOSTS_OF_NOBODY.fullmatch(host) or "noreply" in box[0] + host
        ):
            start = text.rindex(box[0], 0, match.start())
            yield Hit(start, match.end(), "an e-mail address", _TAKE_OUT)
    for match in _GROUPS.finditer(text):
        if _FIGURE.fullmatch(match[0]):
            continue
        # What stands before is looked at afterwards: to start at a digit is what makes the search quick.
        if sign := _BEFORE_GROUPS.search(text[max(0, match.start() - 3) : match.start()]):
            start = match.start() - len(sign[0])
            if kind := _kind_of_number(text[start : match.end()], text[max(0, start - 32) : start]):
                yield Hit(start, match.end(), kind, _TAKE_OUT)
    for match in _IBAN.finditer(text):
        if _is_iban(match[0].replace(" ", "")):
            yield Hit(*match.span(), "a bank account", _TAKE_OUT)
    for match in _IPV4.finditer(text):
        before = text[max(0, match.start() - 1) : match.start()]
        if not re.match(r"[\w.+-]", before) and _is_machine(match[0]) and not _is_version(match, text):
            yield Hit(*match.span(), "an IP address", _TAKE_OUT)
    for match in _IPV6.finditer(text) if _COLONS.search(text) else ():
        if _is_machine(match[0]):
            yield Hit(*match.span(), "an IP address", _TAKE_OUT)


def find_names(text: str, names: Collection[str]) -> Iterator[Hit]:
    """Each of the names as a word of its own, in any case.

    A name that is a word, such as `max` or `may`, counts only where it stands for an account: in the path of a home, before an
    @, or after `user:` and the like.
    """
    words = {name for name in names if is_word(name)}
    rare = set(names) - words
    patterns = []
    if rare:
        patterns.append(rf"(?<![^\W_])(?:{_any(rare)})(?![^\W_])")
    if words:
        own = rf"(?:{_any(words)})(?![^\W_])"
        patterns.append(
            rf"(?:home|users)[/\\]{{1,2}}{own}|~{own}(?=/)|(?<![^\W_]){own}@[a-z][\w-]{{2,}}|{_IDENTITY}{own}"
        )
    # A search for the name alone is quicker; other scripts have letters whose small form is longer.
    lower = text.lower() if text.isascii() else None
    if lower is not None and not any(name.lower() in lower for name in names):
        return
    for pattern in patterns:
        for match in re.finditer(pattern, text, re.IGNORECASE):
            yield Hit(*match.span(), "a user or host name of this machine", _TAKE_OUT)


def machine_names(public: Iterable[str] = ()) -> frozenset[str]:
    """Names of this machine and of who works on it, in small letters, but those that are `public`, as the repository's owner.

    Left out are names that many share, such as `root`, `runner` or `localhost`, those of one or two characters, and
    mere numbers: they give nobody away, and stand in many a text.
    """
    variables = ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "COMPUTERNAME")
    found = {os.environ.get(variable, "") for variable in variables} | {socket.gethostname(), Path.home().name}
    try:
        found.add(getpass.getuser())
    except (OSError, KeyError):  # an account without a name
        pass
    found |= {name.partition(".")[0] for name in found}
    names = {name.casefold() for name in found if len(name) > 2 and not name.isdigit()}
    return frozenset(names - _GENERIC_NAMES - {name.casefold() for name in public})


def names_in(*repositories: str) -> set[str]:
    """What the ids of repositories make public: owners, names, and the words in them."""
    ids = "/".join(repositories)
    return {*ids.split("/"), *re.findall(r"[^\W_]+", ids)}


def is_word(name: str) -> bool:
    """Whether a name is a word that may stand in any text: one of the package's own, a given name, or short and readable."""
    name = name.casefold()
    if name in _GIVEN_NAMES or name in _own_words():
        return True
    return len(name) <= 5 and name.isalpha() and _READABLE.fullmatch(name) is not None


@cache
def _own_words() -> frozenset[str]:
    """Words of the texts, banks, templates and settings that come with the package."""
    package = Path(__file__).parent.parent
    found: set[str] = set()
    folders = "data/texts/* data/banks/* hub/templates/* concepts/* methods/*.py evaluation/*.py"
    for pattern in folders.split():
        for path in package.glob(pattern):
            if path.is_file():
                found.update(re.findall(r"[a-z]+", path.read_text(encoding="utf-8").lower()))
    return frozenset(found)


def _any(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))


def _kind_of_number(found: str, before: str) -> str | None:
    digits = re.sub(r"\D", "", found)
    if _CARDS.fullmatch(digits) and _luhn(digits) and _CARD_GROUPS.fullmatch(found):
        return "a card number"
    if _SOCIAL.fullmatch(found):
        return "a number of a person"
    if _ISBN.search(before) or len(digits) == 13 and digits.startswith(("978", "979")):
        return None
    if 6 <= len(digits) <= 17 and _ACCOUNT.search(before):
        return "a bank account"
    if not 7 <= len(digits) <= 15 or _FIGURE_OR_DATE.fullmatch(found):
        return None
    if _CALL.search(before):
        return "a telephone number"
    if _INTERNATIONAL.fullmatch(found) and len(digits) >= 9 and (found.startswith("+") or " " in found):
        # Ten and more digits without a gap, or groups of them: not a signed figure such as +12345678.
        return "a telephone number" if len(digits) >= 10 or re.search(r"\d[ ().-]\d", found) else None
    pairs = [int(pair) for pair in re.split(r"\D", found) if pair]
    if pairs == list(range(pairs[0], pairs[0] + len(pairs))):  # numbers that were counted
        return None
    if _AMERICAN.fullmatch(found) or 9 <= len(digits) <= 12 and _NATIONAL.fullmatch(found):
        return "a telephone number"
    return None


def _luhn(digits: str) -> bool:
    values = [int(digit) for digit in reversed(digits)]
    return sum(values[::2] + [sum(divmod(2 * value, 10)) for value in values[1::2]]) % 10 == 0 and len(set(digits)) > 1


def _is_iban(number: str) -> bool:
    return 15 <= len(number) <= 34 and int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def _is_machine(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    public = found.is_global and not (found.version == 4 and found.is_multicast)
    return public or any(found in network for network in _PRIVATE)


def _is_version(match: re.Match[str], text: str) -> bool:
    """Whether four numbers are a version or a section: said to be one, or all of them small."""
    if _VERSION.search(text[max(0, match.start() - 12) : match.start()]):
        return True
    numbers = [int(number) for number in match.groups()]
    return numbers[0] != 10 and all(number < 32 for number in numbers) or numbers[0] < 10 and max(numbers) < 100
