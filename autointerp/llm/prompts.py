"""Turn the files under ``prompts/``, which hold every word that is sent to a model, into messages.

A conversation ``x`` is three files:

* ``x.md``            the system message;
* ``x_request.md``    the layout of a question (a Jinja template), also used for the examples;
* ``x_examples.toml`` solved questions (``[[example]]`` tables): an ``answer`` and the template's values.

All messages before the last question have the same bytes in every request, so servers can cache them. The digest of the
files is stored with every explanation and verdict: editing a prompt starts new results and keeps the old ones.
"""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass, replace
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
class Conversation:
    """A system message, solved examples, and a template for the question that follows."""

    prefix: tuple[Message, ...]  # the messages before the question, equal in every request
    request: jinja2.Template
    hash: str  # Digest of its files. 64 hex characters.

    def messages(self, **values: Any) -> tuple[Message, ...]:
        """Return all messages, with the question rendered from ``values``, which are not read as templates."""
        return (*self.prefix, {"role": "user", "content": self.request.render(values).strip()})

    @property
    def instructions(self) -> str:
        return self.prefix[0]["content"]

    @property
    def examples(self) -> list[str]:
        """The text of each solved example, question and answer."""
        texts = [message["content"] for message in self.prefix[1:]]
        return [f"{question}\n{answer}" for question, answer in zip(texts[::2], texts[1::2], strict=True)]

    def without(self, example: int) -> Conversation:
        """Return the conversation without one of its examples, counted from 0, under the same hash."""
        start = 1 + 2 * example
        return replace(self, prefix=self.prefix[:start] + self.prefix[start + 2 :])


def load(name: str, folder: Path = FOLDER) -> str:
    """Read the prompt file ``name``."""
    path = folder / name
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise NotFound(
            f"prompt file {str(path)!r} cannot be read ({error.strerror}); restore it, or install the program again"
        ) from None
    except UnicodeDecodeError:
        raise BadInput(f"prompt file {str(path)!r} is not UTF-8 text; save it as such") from None


def conversation(name: str, folder: Path = FOLDER) -> Conversation:
    """Read the conversation ``name`` from its three files. Raises NotFound or BadInput for a missing or invalid one."""
    files = [load(f"{name}{ending}", folder) for ending in (".md", "_request.md", "_examples.toml")]
    system, request, solved = files
    where = f"prompt files {name!r} in {str(folder)!r}"
    messages: list[Message] = [{"role": "system", "content": system.strip()}]
    try:
        template = _jinja.from_string(request)
        for values in tomllib.loads(solved)["example"]:
            answer = values.pop("answer").strip()
            messages.append({"role": "user", "content": template.render(values).strip()})
            messages.append({"role": "assistant", "content": answer})
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{where}: the examples are not valid TOML: {error}") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{where}: every [[example]] needs an answer and the template's values ({error})") from None
    except jinja2.TemplateError as error:
        raise BadInput(f"{where}: the template cannot be filled in: {error}") from None
    digest = hashlib.sha256("".join(hashlib.sha256(text.encode()).hexdigest() for text in files).encode()).hexdigest()
    return Conversation(tuple(messages), template, digest)
