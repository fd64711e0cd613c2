"""Plain text, cut into passages."""

import re
from collections.abc import Iterator
from itertools import pairwise


# A passage that is longer would be cut to `max_length` in training, and its end never be read.
LONGEST = 1000
# A line that is shorter was not wrapped.
_WRAPPED = 40
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)]*\s")


def passages(text: str, longest: int = LONGEST) -> list[str]:
    """Cut a plain text into passages, losing nothing but the white space between them.

    A blank line ends a passage. In a text without any each line is one, unless most go on in lower case where a long line
    ended: then it is one text that was wrapped. What is longer than `longest` characters is cut behind a line, a sentence
    or a word.
    """
    blocks = re.split(r"\n\s*\n", text.strip())
    lines = text.strip().split("\n")
    going_on = sum(len(before) > _WRAPPED and line[:1].islower() for before, line in pairwise(lines))
    if len(blocks) == 1 and 2 * going_on < len(lines):
        blocks = lines
    return [passage for block in blocks for passage in _cut(block.strip(), longest) if passage]


def _cut(block: str, longest: int) -> Iterator[str]:
    start = 0
    while len(block) - start > longest:
        head = block[start : start + longest + 1]
        ends = (head.rfind("\n"), max((match.end() for match in _SENTENCE_END.finditer(head)), default=0))
        end = start + (max(ends) if max(ends) > 0 else max(head.rfind(" "), 0) or longest)
        yield block[start:end].strip()
        start = end
    yield block[start:].strip()
