"""Read a dataset's column: text, chat messages, or token ids.

Messages are rendered by the chat template of the subject model. Token ids are taken as they are, if they can be of the
subject model's tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, cast

from sae.common.errors import BadInput
from sae.common.hub import first_line
from sae.text.sources import Document, Form, find_form, get_text, split_text

_SHOWN_IDS = 16


class Reader:
    """Reads the documents of one column, all of one form."""

    def __init__(self, form: Form | None, column: str, where: str, tokenizer: Any) -> None:
        self.form: Form = form or "text"
        self.column = column
        self._where, self._tokenizer = where, tokenizer

    @functools.cached_property
    def template(self) -> str:
        """The chat template. Raises BadInput if the subject model has none."""
        try:
            return str(self._tokenizer.get_chat_template())
        except (ValueError, AttributeError):  # none, or several of which none is the default
            raise BadInput(
                f"{self._where}: column {self.column!r} holds chat messages, and the subject model's tokenizer has no "
                "chat template; choose a column of text, or the chat version of the model"
            ) from None

    @functools.cached_property
    def _n_ids(self) -> int:
        return count_token_ids(self._tokenizer)

    def check(self, row: Mapping[str, Any]) -> None:
        """Raise NotFound or BadInput if the first row cannot be read."""
        for _ in self.read("", row, self._where):
            pass

    def describe(self, row: Mapping[str, Any]) -> str:
        """Say how the column is read, for the user to check."""
        if self.form == "messages":
            return f"column {self.column!r} holds chat messages, rendered by the subject model's chat template"
        begin = self._tokenizer.decode(row[self.column][:_SHOWN_IDS])
        return f"column {self.column!r} holds token ids, taken as the subject model's; the first row begins {begin!r}"

    def read(self, name: str, row: Mapping[str, Any], where: str) -> Iterator[Document]:
        """Yield the document of a row in pieces; ``where`` begins the error messages. A missing value is empty."""
        value = row.get(self.column)
        form = find_form(value)
        if form not in (self.form, None):
            raise BadInput(
                f"{where}: column {self.column!r} holds {form}, but {self.form} in the first row; "
                "choose a column of one kind"
            )
        if form == "messages":
            yield from split_text(name, self._render(value, where))
        elif form == "token ids":
            yield Document(name, "", ids=self._check_ids(cast(list[int], value), where))
        elif value == [] and self.form != "text":
            yield Document(name, "")
        else:
            yield from split_text(name, get_text(row, self.column, where))

    def _render(self, messages: Any, where: str) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False))
        except BadInput:
            raise
        except Exception as error:  # templates raise what they like
            raise BadInput(
                f"{where}: the subject model's chat template refuses column {self.column!r} ({first_line(error)}); "
                "fix or remove the row"
            ) from None

    def _check_ids(self, ids: list[int], where: str) -> list[int]:
        wrong = next((i for i in ids if not 0 <= i < self._n_ids), None)
        if wrong is not None:
            raise BadInput(
                f"{where}: column {self.column!r} holds token id {wrong}, and the subject model's tokenizer has "
                f"0 to {self._n_ids - 1}: the ids are of another tokenizer; choose a column of text"
            )
        return ids


def count_token_ids(tokenizer: Any) -> int:
    """Return one more than the largest token id."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
