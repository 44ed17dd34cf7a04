"""The page on language-model servers: its commands work on local servers that behave as each one is documented to."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from doc_commands import ours
from doc_pages import Page, pages, tables
from test_dry_run import Tokenizing, llama_cpp, vllm
from tiny_study import cli

PAGE = next(page for page in pages() if page.name == "docs/servers.md")
KEY = "k3y-0123456789abcdef"
TABLE = {re.sub(r"\[(.+?)\].*", r"\1", row[0]): row for row in tables(PAGE.text)[1][1:]}
PLAIN = {"gives_logprobs": False, "holds_schemas": False, "counts_cached": False}
SERVERS: dict[str, dict[str, Any]] = {
    "vLLM": {"reply_to": vllm, "counts_cached": False, "context_length": 4096},
    "llama.cpp": {"reply_to": llama_cpp},
    "Ollama": {"counts_cached": False},
    "LM Studio": {"gives_logprobs": False, "counts_cached": False},
    "OpenAI": {"key": KEY},
    "OpenRouter": {"key": KEY, "prefix": "/api/v1", "gives_logprobs": False},
    "Anthropic": {"key": KEY, **PLAIN},
    "Gemini": {"key": KEY, "prefix": "/v1beta/openai", "gives_logprobs": False, "counts_cached": False},
    "Azure": {
        "key": KEY,
        "key_header": "api-key",
        "prefix": "/openai/deployments/DEPLOYMENT",
        "query": "api-version=2024-10-21",
        "models": None,
    },
}
"""As documented in November 2026: what each does of what it is asked."""


def commands_of(page: Page, name: str) -> list[list[str]]:
    """The commands ``llm`` in the section ``name`` that name an address."""
    blocks = [block for block in page.blocks() if section_of(page, block.line) == name]
    words = [ours(line) or [] for block in blocks for line in block.commands()]
    return [found[1:] for found in words if found[:1] == ["llm"] and "--llm-url" in found]


def section_of(page: Page, line: int) -> str:
    heads = re.findall(r"^## (.+)$", "\n".join(page.text.splitlines()[:line]), re.MULTILINE)
    return heads[-1] if heads else ""


def test_every_server_has_a_row_a_section_and_a_command() -> None:
    assert list(TABLE) == list(SERVERS) == list(PAGE.sections())[: len(SERVERS)]
    assert all(commands_of(PAGE, name) for name in SERVERS)
    assert {row[-1] for name, row in TABLE.items() if name in ("vLLM", "llama.cpp")} == {"the program"}


@pytest.mark.parametrize("name", SERVERS)
def test_commands_find_what_the_page_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is sent to a server of that kind, under its own path, with the key where the page puts it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("AUTOINTERP_API_KEY", KEY)
    for variable in re.findall(r"\$([A-Z_]+_KEY)", PAGE.text):
        monkeypatch.setenv(variable, KEY)
    for words in commands_of(PAGE, name):
        given = words[words.index("--llm-url") + 1]
        models = [words[words.index("--llm-model") + 1]] if "--llm-model" in words else ["some/model"]
        server = {"models": models, **SERVERS[name]}
        with Tokenizing(server.pop("reply_to", lambda *_: None), **server) as running:
            place = re.sub(r"^https?://[^/]+", running.root, given)
            ran = cli("llm", *(place if word == given else word for word in words), "--root", tmp_path, "--json")
            found = ran.well().json
        row = [
            "yes" if found["logprobs"] and found["label_first"] else "no",
            "yes" if found["json_schema"] else "no",
            "yes" if found["cached_tokens"] else "no",
            "exact" if found["exact"] else "estimated",
        ]
        assert row == TABLE[name][1:5]
        assert KEY not in ran.out + ran.err
        for header in (value for flag, value in pairwise(words) if flag == "--llm-header"):
            name_, _, value = header.partition("=")
            assert {seen.headers[name_.lower()] for seen in running.probes} == {os.path.expandvars(value)}
