"""Turn the files under ``prompts/``, which hold every word that is sent to a model, into messages.

A conversation ``x`` is three files:

* ``x.md``            the system message;
* ``x_request.md``    the layout of a question (a Jinja template), also used for the examples;
* ``x_examples.toml`` solved questions (``[[example]]`` tables): an ``answer`` and the template's values.

All messages before the last question have the same bytes in every request, so servers can cache them. The digest of the
files is stored with every explanation and verdict: editing a prompt starts new results and keeps the old ones.
"""

from __future__ import annotations

import functools
import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from autointerp.llm.exchange import Message
from sae.common.errors import BadInput, NotFound
from sae.common.package_data import data_folder

FOLDER = data_folder(packaged="autointerp/_prompts", in_checkout="prompts")

_jinja = jinja2.Environment(
    undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)


@dataclass(frozen=True)
class Prompt:
    """The text of one file."""

    text: str
    hash: str
    """SHA-256 of the file. 64 hex characters."""

    def render(self, **values: Any) -> str:
        """Fill in the text as a Jinja template. Values are not read as templates."""
        return _template(self.text).render(**values).strip()


@functools.lru_cache(maxsize=32)
def _template(text: str) -> jinja2.Template:
    return _jinja.from_string(text)


@dataclass(frozen=True)
class Example:
    """A solved question of a few-shot prefix."""

    values: dict[str, Any]
    answer: str


@dataclass(frozen=True)
class Conversation:
    """A system message, solved examples, and a template for the question that follows."""

    prefix: tuple[Message, ...]
    """The messages before the question, equal in every request."""
    request: Prompt
    examples: tuple[Example, ...]
    hash: str
    """Digest of its files. 64 hex characters."""

    def messages(self, **values: Any) -> tuple[Message, ...]:
        """Return all messages, with the question rendered from ``values``."""
        return (*self.prefix, {"role": "user", "content": self.request.render(**values)})


def load(name: str, folder: Path = FOLDER) -> Prompt:
    """Read the prompt file ``name``; ``.md`` is added to a bare name."""
    path = folder / (name if "." in name else f"{name}.md")
    try:
        content = path.read_bytes()
        return Prompt(content.decode(), hashlib.sha256(content).hexdigest())
    except OSError as error:
        raise NotFound(
            f"prompt file {str(path)!r} cannot be read ({error.strerror}); restore it, or install the program again"
        ) from None
    except UnicodeDecodeError:
        raise BadInput(f"prompt file {str(path)!r} is not UTF-8 text; save it as such") from None


def conversation(name: str, folder: Path = FOLDER) -> Conversation:
    """Read the conversation ``name`` from its three files.

    :raises NotFound: a file is missing.
    :raises BadInput: a file is invalid.
    """
    system, request = load(name, folder), load(f"{name}_request", folder)
    solved = load(f"{name}_examples.toml", folder)
    where = f"prompt files {name!r} in {str(folder)!r}"
    messages: list[Message] = [{"role": "system", "content": system.text.strip()}]
    examples = []
    try:
        for table in tomllib.loads(solved.text)["example"]:
            example = Example({k: v for k, v in table.items() if k != "answer"}, table["answer"].strip())
            examples.append(example)
            messages.append({"role": "user", "content": request.render(**example.values)})
            messages.append({"role": "assistant", "content": example.answer})
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{where}: the examples are not valid TOML: {error}") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{where}: every [[example]] needs an answer and the template's values ({error})") from None
    except jinja2.TemplateError as error:
        raise BadInput(f"{where}: the template cannot be filled in: {error}") from None
    joined = "".join(part.hash for part in (system, request, solved))
    digest = hashlib.sha256(joined.encode()).hexdigest()
    return Conversation(tuple(messages), request, tuple(examples), digest)
