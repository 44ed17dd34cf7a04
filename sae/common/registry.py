"""Ways of doing one thing, each a file of one package: a new file there is all that it takes to add one.

A way is called as its file is: ``sae/dictionaries/architectures/topk.py`` is ``topk``, and holds one class that says so
itself. The names are read off the folder, so that they can be listed without importing anything; the class is imported
when it is asked for. ``base`` and names that begin with an underscore are no ways.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sae.common.errors import BadInput, suggest

T = TypeVar("T")


class Registry(Mapping[str, type[T]]):
    """The classes of a package by name, in alphabetical order.

    Args:
        package: the importable name of the package, such as ``sae.dictionaries.architectures``.
        what: one of them in words, for error messages.
        attribute: where the class says its name.
    """

    def __init__(self, package: str, what: str, attribute: str = "name") -> None:
        self._package, self.what, self._attribute = package, what, attribute

    def __iter__(self) -> Iterator[str]:
        found = {module.name for module in pkgutil.iter_modules(sys.modules[self._package].__path__)}
        return iter(sorted(name for name in found if name != "base" and not name.startswith("_")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)

    def __getitem__(self, name: str) -> type[T]:
        """The class called ``name``.

        Raises KeyError where there is no such file, BadInput, in one line that names the file, where it cannot be
        imported or holds no such class.
        """
        if name not in self:
            raise KeyError(name)
        module = self._imported(name)
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and value.__module__ == module.__name__
            and getattr(value, self._attribute, None) == name
        ]
        if len(classes) != 1:
            raise BadInput(
                f"{module.__file__}: {len(classes) or 'no'} class{'es' * (len(classes) > 1)} in it with "
                f"{self._attribute} = {name!r}; a {self.what} is one class that is named as its file"
            )
        return classes[0]

    def choose(self, name: str, flag: str) -> type[T]:
        """The class called ``name``, or BadInput that offers the nearest; ``flag`` is what the user wrote."""
        return self[self.check(name, flag)]

    def check(self, name: str, flag: str, *more: str) -> str:
        """``name`` where it is known, or is one of ``more``; else BadInput that offers the nearest."""
        if name in more or name in self:
            return name
        raise BadInput(f"{flag} {name!r} is not known; choose {suggest(name, [*more, *self])}")

    def join_names(self, *more: str) -> str:
        """All names for a line of help, ``more`` before them."""
        return ", ".join([*more, *self])

    def _imported(self, name: str) -> Any:
        try:
            return importlib.import_module(f"{self._package}.{name}")
        except (Exception, SystemExit) as error:  # whatever a file does when it is imported
            place = _place(self._package, name)
            why = str(error).splitlines()[0] if str(error) else "no reason given"
            raise BadInput(
                f"{place} cannot be imported ({type(error).__name__}: {why}); mend the file or take it out"
            ) from error


def _place(package: str, name: str) -> Path:
    """The file of a module that may not be imported."""
    folders = [Path(folder) for folder in sys.modules[package].__path__]
    return next((path for folder in folders if (path := folder / f"{name}.py").is_file()), folders[0] / name)
