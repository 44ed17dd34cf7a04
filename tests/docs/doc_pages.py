"""The pages for users, taken apart: code blocks and their marks, links, headings, tables, what is set in code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHELL = ("sh", "console")
OUTPUT = ("", "text")
_FENCE = re.compile(r"^( *)```(\w*)\s*$")
_MARK = re.compile(r"^<!-- *(not run|exit): *(.+?) *-->$")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``not_run`` is why its commands are only parsed, ``code`` the exit code that the page claims."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None = None
    code: int = 0

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> Iterator[str]:
        """The commands of a shell block, one line each: continued lines joined, outputs of a console left out."""
        if self.language not in SHELL:
            return
        for line in re.sub(r"\\\n\s*", "", self.text).splitlines():
            if self.language == "console":
                if line.startswith("$ "):
                    yield line.removeprefix("$ ").strip()
            elif shlex.split(line, comments=True):
                yield line.strip()


@dataclass(frozen=True)
class Page:
    """A page, by its path from the repository's root."""

    name: str
    text: str

    @property
    def folder(self) -> Path:
        return (REPOSITORY / self.name).parent

    def blocks(self) -> list[Block]:
        """All fenced blocks, in order."""
        found: list[Block] = []
        fence: tuple[int, str, dict[str, str]] | None = None
        marks: dict[str, str] = {}
        held: list[str] = []
        for number, line in enumerate(self.text.splitlines(), start=1):
            opened = _FENCE.match(line)
            if fence is not None:
                if opened and not opened[2]:
                    start, language, of = fence
                    code = int(of.get("exit", "0"))
                    found.append(Block(self.name, start, language, "\n".join(held), of.get("not run"), code))
                    fence = None
                else:
                    held.append(line)
            elif opened:
                fence, held, marks = (number, opened[2], marks), [], {}
            elif mark := _MARK.match(line.strip()):
                marks[mark[1]] = mark[2]
            elif line.strip():
                marks = {}
        assert fence is None, f"{self.name}: a block is not closed"
        return found

    @property
    def prose(self) -> str:
        """The page without its fenced blocks, with as many lines."""
        lines, inside = [], False
        for line in self.text.splitlines():
            fence = bool(_FENCE.match(line))
            inside = inside != fence
            lines.append("" if inside or fence else line)
        return "\n".join(lines)

    def links(self) -> list[str]:
        """The targets of links and images."""
        return [one or other for one, other in _LINK.findall(_CODE.sub("", self.prose))]

    def code(self) -> list[str]:
        """What is set as code within the text."""
        return _CODE.findall(self.prose)

    def headings(self) -> list[str]:
        return [line.lstrip("#").strip() for line in self.prose.splitlines() if re.match(r"#{1,6} ", line)]

    def anchors(self) -> set[str]:
        """What GitHub calls the headings in addresses."""
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in self.headings()}

    def sections(self) -> dict[str, str]:
        """Heading of the second level → the text below it."""
        parts = re.split(r"^## (.+)$", self.prose, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True))


def pages() -> list[Page]:
    """Return README, CONTRIBUTING, SECURITY, then docs/ in reading order, then any other page."""
    first = [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "docs/README.md",
        "docs/tutorial.md",
        "docs/reading-the-report.md",
        "docs/files.md",
    ]
    rest = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md"))
    return [Page(name, (REPOSITORY / name).read_text()) for name in dict.fromkeys([*first, *rest])]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text as rows of cells, the heading first, the rule below it left out."""
    found: list[list[list[str]]] = []
    before = False
    for line in text.splitlines():
        is_row = line.startswith("|")
        if is_row and not before:
            found.append([])
        if is_row and not re.fullmatch(r"[|:\- ]+", line):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        before = is_row
    return found


def codes(cell: str) -> list[str]:
    """What is set as code in a cell."""
    return _CODE.findall(cell)
