"""Every word that is sent to a model lies in a file under ``prompts/``; here they become messages.

A conversation ``x`` is three files:

* ``x.md``            what the model is told first (the system message);
* ``x_request.md``    how a question is laid out (a Jinja template);
* ``x_examples.toml`` solved questions (``[[example]]`` tables): an ``answer`` and the template's values.

Examples are laid out by the same template as real questions, so they cannot drift apart, and everything before
the last question is the same bytes in every request: servers keep such a prefix and read it once.

The digest of the files is stored with every explanation and verdict. Editing a prompt thus never changes old
results; it starts new ones beside them.
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
    """One file's text."""

    text: str
    hash: str
    """SHA-256 of the file's bytes. 64 hex characters."""

    def render(self, **values: Any) -> str:
        """The text as a Jinja template, filled in. Values are put in as they are and never read as templates."""
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
    """The messages before the question, the same in every request."""
    request: Prompt
    examples: tuple[Example, ...]
    hash: str
    """Digest of all files it was made from. 64 hex characters."""

    def messages(self, **values: Any) -> tuple[Message, ...]:
        """The whole request, its question laid out from ``values``."""
        return (*self.prefix, {"role": "user", "content": self.request.render(**values)})


def load(name: str, folder: Path = FOLDER) -> Prompt:
    """The prompt file ``name``; ``.md`` is added to a bare name.

    :raises NotFound: the file is missing.
    :raises BadInput: the file is not UTF-8 text.
    """
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
    """The conversation ``name`` out of its three files (see this module's head).

    :raises NotFound: a file is missing.
    :raises BadInput: a file cannot be used; the line says which and why.
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
