"""List the plug-ins of a package: each file holds one class, and a new file adds one.

``architectures/topk.py`` holds the class whose ``name`` is ``topk``. Names come from the folder, so listing imports
nothing. ``base`` and names that start with an underscore are not plug-ins.
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

    ``what`` is a noun for one of them, for error messages; ``attribute`` is the class attribute that holds the name.
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
        """Import and return the class called ``name``; raise KeyError without a file, BadInput for an unusable one."""
        if name not in self:
            raise KeyError(name)
        module = self._import(name)
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        classes = [value for value in own if getattr(value, self._attribute, None) == name]
        if len(classes) != 1:
            raise BadInput(
                f"{module.__file__} has {len(classes) or 'no'} class{'es' * (len(classes) > 1)} with "
                f"{self._attribute} = {name!r}; define one {self.what} in it, with the file's name"
            )
        return classes[0]

    def spell(self, name: str) -> str:
        """Return ``name`` as its file spells it: ``input_output`` for ``input-output``; an unknown one as it is."""
        return spelt if (spelt := name.replace("-", "_")) in self else name

    def check(self, name: str, flag: str, *more: str) -> str:
        """Return ``name`` if it is known or in ``more``, or raise BadInput about ``flag`` that suggests one."""
        if (name := self.spell(name)) in more or name in self:
            return name
        raise BadInput(f"{flag} {name!r} is not known; choose {suggest(name, [*more, *self])}")

    def join_names(self, *more: str) -> str:
        """Join ``more`` and all names for help text."""
        return ", ".join([*more, *self])

    def _import(self, name: str) -> Any:
        try:
            return importlib.import_module(f"{self._package}.{name}")
        except (Exception, SystemExit) as error:  # a plug-in may raise anything
            files = [Path(folder) / f"{name}.py" for folder in sys.modules[self._package].__path__]
            file = next((path for path in files if path.is_file()), files[0])
            why = str(error).splitlines()[0] if str(error) else "no reason given"
            raise BadInput(f"{file} cannot be imported ({type(error).__name__}: {why}); fix or remove it") from error
