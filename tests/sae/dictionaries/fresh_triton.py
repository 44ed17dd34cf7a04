"""Triton imported anew, to run its programs without a GPU: interpreted, or only compiled.

Triton looks at TRITON_INTERPRET when a program is defined, and its own library is full of programs. So it depends on
who imported it first, unless all of it is imported again under the wanted setting, and put away afterwards.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

from sae.dictionaries import kernels

_OURS = ("cuda", "cuda_programs")


@contextmanager
def interpreted_steps() -> Iterator[Any]:
    """Run ``kernels.cuda`` on tensors in main memory with Triton's interpreter, with blocks small enough to test."""
    with _fresh("1") as (steps, patch):
        interpreter = importlib.import_module("triton.runtime.interpreter")
        core = importlib.import_module("triton.language.core")

        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            # Triton prepares its library anew for each program that a program calls, half of all the time; once does.
            if core.is_builtin(core.load):
                interpreter._patch_lang(self.fn)
            return self.rewrite()(*arguments, **named)

        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        for name, value in {"_LANES": 8, "_SHORT_LIST": 4, "_TILE": 32, "_FLAT": 16}.items():
            patch.setattr(steps, name, value)
        yield steps


@contextmanager
def compiled_steps(capability: int) -> Iterator[tuple[Any, list[Any]]]:
    """``sae.dictionaries.kernels.cuda`` that compiles for a CUDA device which need not be there, and launches nothing.

    Also yields the list of what was compiled, which grows. ``capability`` is 80 for sm_80.
    """
    with _fresh("0") as (steps, patch):
        compiler = importlib.import_module("triton.backends.compiler")
        jit = importlib.import_module("triton.runtime.jit")
        driver = importlib.import_module("triton.runtime").driver

        class Absent:
            def get_current_target(self) -> Any:
                return compiler.GPUTarget("cuda", capability, 32)

            def get_current_device(self) -> int:
                return 0

            def get_current_stream(self, device: int) -> int:
                return device

        programs: list[Any] = []
        run = jit.JITFunction.run

        def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
            assert not warmup
            programs.append(run(self, *arguments, grid=grid, warmup=True, **named))

        patch.setattr(jit.JITFunction, "run", only_compile)
        driver.set_active(Absent())
        yield steps, programs


@contextmanager
def _fresh(interpret: str) -> Iterator[tuple[Any, pytest.MonkeyPatch]]:
    if find_spec("triton") is None:
        pytest.skip("Triton is installed for Linux on x86-64 only")
    before = _taken_out()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", interpret)
            yield importlib.import_module("sae.dictionaries.kernels.cuda"), patch
    finally:
        _taken_out()
        sys.modules.update(before)
        for name in _OURS:
            if f"{kernels.__name__}.{name}" in before:
                setattr(kernels, name, before[f"{kernels.__name__}.{name}"])


def _taken_out() -> dict[str, ModuleType]:
    """Every module that is Triton's or built on it, but for the compiled one, which cannot be loaded twice."""
    names = [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]
    for name in _OURS:
        names += [full] if (full := f"{kernels.__name__}.{name}") in sys.modules else []
        vars(kernels).pop(name, None)
    return {name: sys.modules.pop(name) for name in names}
