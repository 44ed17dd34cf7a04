"""What a vLLM server of ours is to serve, under which name, and by which interpreter: all that can be told beforehand.

The name goes into the journal and into the keys of kept answers, so it has to be known before the server runs, and
has to mean one model. A name on the hub does. A folder's name does not (two trainings may both be called ``final``),
and neither does its configuration, which they share; so to the folder's name a few digits are added of a digest of
everything that decides the answers: configuration, tokenizer, chat template, and samples of the weights. Arguments
that change what is computed (a quantization, say) add a few digits of their own; those that only change how fast it
is, or how much fits, do not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae.activations.bundled import BUNDLED
from sae.common.errors import BadInput, NotFound, Unavailable
from sae.common.files import digest, digest_file, digest_samples
from sae.common.hub import Kind, find_on_hub, looks_like_path
from sae.common.package_data import IS_CHECKOUT, TOP

PYTHON_VARIABLE = "AUTOINTERP_VLLM_PYTHON"
OWN_PYTHON = TOP / ".venv-vllm" / "bin" / "python"
"""Where ``make vllm`` puts it in a checkout."""
INSTALL = "run `make vllm`" if IS_CHECKOUT else "install it (`pip install vllm`) in an environment of its own"
"""How to get vLLM, for a message."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_WORDS = (".json", ".jinja", ".model", ".txt")
"""Endings of the small files that decide how text becomes tokens and tokens are chosen."""
_SMALL = 64 << 20
_ABOUT_TRAINING = {"training.json", "trainer_state.json"}

_OURS = (
    *("--model", "--revision", "--served-model-name", "--host", "--port", "--uds"),
    *("--allowed-origins", "--ssl-keyfile", "--ssl-certfile"),
)
_SECRETS = {"--api-key": "a server on this machine alone needs none", "--hf-token": "set HF_TOKEN in the environment"}
_SAME_ANSWERS = frozenset(
    f"--{name}"
    for name in (
        *("max-model-len", "max-num-seqs", "max-num-batched-tokens", "gpu-memory-utilization", "kv-cache-memory-bytes"),
        *("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size", "distributed-executor-backend"),
        *("enforce-eager", "enable-prefix-caching", "no-enable-prefix-caching", "enable-chunked-prefill"),
        *("no-enable-chunked-prefill", "cpu-offload-gb", "swap-space", "block-size", "num-gpu-blocks-override"),
        *("download-dir", "max-logprobs", "uvicorn-log-level", "disable-log-stats", "max-log-len"),
        *("enable-log-requests", "no-enable-log-requests", "disable-uvicorn-access-log", "trust-remote-code"),
        *("async-scheduling", "no-async-scheduling", "api-server-count"),
    )
) | {"-tp", "-pp", "-dp"}
"""Arguments that decide how fast answers come and how much fits, and not which they are."""


@dataclass(frozen=True)
class VllmModel:
    """A model and the arguments that it is served with.

    Attributes:
        place: what vLLM is given: a folder (absolute) or a name on the hub.
        name: what it is served as; see this module's head.
        revision: the branch, tag or commit on the hub, where one was named.
        is_local: nothing has to be downloaded.
        arguments: further words of the command line.
    """

    place: str
    name: str
    revision: str | None = None
    is_local: bool = True
    arguments: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """The arguments that say which model; ``arguments`` first, so that they override nothing."""
        return [*self.arguments, "--model", self.place, *(["--revision", self.revision] if self.revision else [])]

    def weight_bytes(self) -> int:
        """The size of a folder's weights; 0 for a model on the hub."""
        folder = Path(self.place)
        return sum(path.stat().st_size for path in _files(folder, _WEIGHTS)) if folder.is_dir() else 0


def find_model(given: str, arguments: str = "", name: str | None = None) -> VllmModel:
    """The model called ``given``: a folder, a hub name (``name@revision``) or ``bundled``.

    :param arguments: further arguments for vLLM, as in a shell.
    :param name: serve it under this name, whatever it is.
    :raises NotFound: there is no such model.
    :raises BadInput: it is no checkpoint, or an argument is not for the user to give.
    :raises Unavailable: the hub cannot be reached and the name is not cached.
    """
    words = split_arguments(arguments)
    changing = _changing_answers(words)
    suffix = f"+{digest(changing)[:6]}" if changing else ""
    folder = BUNDLED if given == "bundled" else Path(given).expanduser()
    if given and folder.exists():
        _check_folder(folder, given)
        folder = folder.absolute()
        called = re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-.") or "model"
        return VllmModel(str(folder), name or f"{called}-{_fingerprint(folder)[:8]}{suffix}", arguments=words)
    if not given or looks_like_path(given) or given == "bundled":
        raise NotFound(f"--vllm {given!r} does not exist; give a model's folder, a hub name or 'bundled'")
    found = find_on_hub(given, Kind.MODEL)
    _, _, revision = given.partition("@")
    return VllmModel(found.name, name or f"{given}{suffix}", revision or None, found.offline, words)


def split_arguments(given: str) -> tuple[str, ...]:
    """``--vllm-args`` as words.

    :raises BadInput: it cannot be read, or names something that this program sets itself, or holds a secret.
    """
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise BadInput(f"--vllm-args cannot be read ({str(error).lower()}); quote it as for a shell") from None
    if words and not words[0].startswith("-"):
        raise BadInput(f"--vllm-args {words[0]!r} is no option of vLLM; write it like '--max-model-len 4096'")
    for word in words:
        flag = _flag(word)
        # vLLM's parser takes the beginning of an option for the whole.
        for known in (*_OURS, *_SECRETS) if len(flag) > 2 and flag.startswith("--") else ():
            if known.startswith(flag):
                why = _SECRETS.get(known, "it is set by this program")
                raise BadInput(f"--vllm-args must not hold {flag}: {why}")
    return tuple(words)


def _flag(word: str) -> str:
    return word.split("=", 1)[0].replace("_", "-") if word.startswith("-") else word


def _changing_answers(words: Sequence[str]) -> list[str]:
    """Those of ``words`` that are not known to leave the answers as they are, values and all."""
    kept, keep = [], False
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-[\d.]+", word):
            keep = _flag(word) not in _SAME_ANSWERS
        if keep:
            kept.append(word)
    return kept


def _check_folder(folder: Path, given: str) -> None:
    if not folder.is_dir():
        raise BadInput(f"--vllm {given!r} is a file; give the folder that holds config.json and the weights")
    if not any((folder / name).is_file() for name in ("config.json", "params.json")):
        raise BadInput(f"--vllm {given!r} is a folder but no model: it has no config.json")
    if not _files(folder, _WEIGHTS):
        raise BadInput(f"--vllm {given!r} holds no weights; fetch its files again")


def _files(folder: Path, endings: Sequence[str]) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in endings and path.is_file()]


def _fingerprint(folder: Path) -> str:
    words = [path for path in _files(folder, _WORDS) if path.name not in _ABOUT_TRAINING]
    small = [[path.name, digest_file(path, _SMALL)] for path in words]
    return digest(
        [small, [[path.name, path.stat().st_size, digest_samples(path)] for path in _files(folder, _WEIGHTS)]]
    )


# --- the interpreter --------------------------------------------------------------------------------------------------


def find_python(given: Path | None = None, environment: Mapping[str, str] | None = None) -> Path:
    """The interpreter that has vLLM: ``given``, else ``$AUTOINTERP_VLLM_PYTHON``, else ``make vllm``'s, else ours.

    :raises NotFound: it was named and is not there.
    :raises Unavailable: it has no vLLM.
    """
    values = os.environ if environment is None else environment
    for origin, named in (("--vllm-python", given), (f"${PYTHON_VARIABLE}", values.get(PYTHON_VARIABLE))):
        if named:
            found = shutil.which(Path(named).expanduser())
            if found is None:
                raise NotFound(f"{origin} {str(named)!r} is no program; give the path of a Python that has vLLM")
            # Not resolved: the link in a virtual environment is what tells the interpreter where it belongs.
            return _with_vllm(Path(found).absolute(), origin)
    if OWN_PYTHON.exists():
        return _with_vllm(OWN_PYTHON, "that of `make vllm`")
    return _with_vllm(Path(sys.executable), "the one that runs this")


def _with_vllm(python: Path, origin: str) -> Path:
    if python == Path(sys.executable):
        has_it = importlib.util.find_spec("vllm") is not None
    else:
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        try:
            has_it = subprocess.run([python, "-c", look], capture_output=True, timeout=120).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            has_it = False
    if not has_it:
        raise Unavailable(
            f"vLLM is not installed in {str(python)!r} ({origin}): {INSTALL}, or name an interpreter that has it "
            "with --vllm-python"
        )
    return python
