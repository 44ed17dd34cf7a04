"""Find the model that a vLLM server of ours serves, its name, and an interpreter with vLLM, before the server runs.

The name is part of the journal and of the keys of cached answers, so it must mean one model. A name on the hub does. A
folder's name does not (two trainings may both be called ``final``), so it gets a few digits of a digest of everything
that decides the answers: configuration, tokenizer, chat template, and samples of the weights. Arguments that change the
answers (a quantization, say) add digits of their own; those that change only speed or memory do not.
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
from sae.common.files import digest, digest_file, digest_samples, expand_user
from sae.common.hub import find_on_hub, looks_like_path
from sae.common.package_data import IS_CHECKOUT, TOP

PYTHON_VARIABLE = "AUTOINTERP_VLLM_PYTHON"
OWN_PYTHON = TOP / ".venv-vllm" / "bin" / "python"  # where ``make vllm`` puts it in a checkout
INSTALL = "run `make vllm`" if IS_CHECKOUT else "install it (`pip install vllm`) in an environment of its own"
"""How to get vLLM, for messages."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SMALL_FILES = (".json", ".jinja", ".model", ".txt")  # configure tokenizer, model and generation
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
"""Arguments that change speed and memory, but not the answers."""


@dataclass(frozen=True)
class VllmModel:
    """A model and its arguments for vLLM."""

    place: str  # an absolute folder or a name on the hub
    name: str  # in requests; see the module's docstring
    revision: str | None = None  # the branch, tag or commit on the hub, if one was named
    is_local: bool = True  # nothing has to be downloaded
    arguments: tuple[str, ...] = ()  # further words of the command line

    def list_words(self) -> list[str]:
        """Return the words of the command line; ``arguments`` first, so that they override nothing."""
        return [*self.arguments, "--model", self.place, *(["--revision", self.revision] if self.revision else [])]

    def weight_bytes(self) -> int:
        """Return the size of a folder's weights; 0 for a model on the hub."""
        folder = Path(self.place)
        return sum(path.stat().st_size for path in _files(folder, _WEIGHTS)) if folder.is_dir() else 0


def find_model(given: str, arguments: str = "", name: str | None = None) -> VllmModel:
    """Find the model ``given``: a folder, a hub name (``name@revision``) or ``bundled``.

    ``arguments`` are further ones for vLLM, as in a shell; ``name`` replaces the derived name.

    :raises NotFound: there is no such model.
    :raises BadInput: it is not a checkpoint, or an argument is not allowed.
    :raises Unavailable: the hub cannot be reached and the name is not cached.
    """
    words = split_arguments(arguments)
    changing = _select_changing(words)
    suffix = f"+{digest(changing)[:6]}" if changing else ""
    folder = BUNDLED if given == "bundled" else expand_user(given)
    if given and folder.exists():
        _check_folder(folder, given)
        folder = folder.absolute()
        called = re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-.") or "model"
        return VllmModel(str(folder), name or f"{called}-{_compute_fingerprint(folder)[:8]}{suffix}", arguments=words)
    if not given or looks_like_path(given) or given == "bundled":
        raise NotFound(f"--vllm {given!r} does not exist; give a model's folder, a hub name or 'bundled'")
    found = find_on_hub(given, "model")
    _, _, revision = given.partition("@")
    return VllmModel(found.name, name or f"{given}{suffix}", revision or None, found.offline, words)


def split_arguments(given: str) -> tuple[str, ...]:
    """Split ``--vllm-args`` into words.

    :raises BadInput: it cannot be read, or holds a secret or an option that this program sets.
    """
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise BadInput(f"--vllm-args cannot be read ({str(error).lower()}); quote it as for a shell") from None
    if words and not words[0].startswith("-"):
        raise BadInput(f"--vllm-args {words[0]!r} is not an option of vLLM; write it like '--max-model-len 4096'")
    for word in words:
        flag = _get_flag(word)
        # vLLM's parser accepts the beginning of an option.
        for known in (*_OURS, *_SECRETS) if len(flag) > 2 and flag.startswith("--") else ():
            if known.startswith(flag):
                why = _SECRETS.get(known, "it is set by this program")
                raise BadInput(f"--vllm-args must not hold {flag}: {why}")
    return tuple(words)


def _get_flag(word: str) -> str:
    return word.split("=", 1)[0].replace("_", "-") if word.startswith("-") else word


def _select_changing(words: Sequence[str]) -> list[str]:
    """Return the options, with values, that are not known to keep the answers unchanged."""
    kept, keep = [], False
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-[\d.]+", word):
            keep = _get_flag(word) not in _SAME_ANSWERS
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


def _compute_fingerprint(folder: Path) -> str:
    words = [path for path in _files(folder, _SMALL_FILES) if path.name not in _ABOUT_TRAINING]
    small = [[path.name, digest_file(path, _SMALL)] for path in words]
    return digest(
        [small, [[path.name, path.stat().st_size, digest_samples(path)] for path in _files(folder, _WEIGHTS)]]
    )


# --- the interpreter --------------------------------------------------------------------------------------------------


def find_python(given: Path | None = None, environment: Mapping[str, str] | None = None) -> Path:
    """Find an interpreter with vLLM: ``given``, ``$AUTOINTERP_VLLM_PYTHON``, that of ``make vllm``, or ours.

    :raises NotFound: it was named and does not exist.
    :raises Unavailable: it has no vLLM.
    """
    values = os.environ if environment is None else environment
    for origin, named in (("--vllm-python", given), (f"${PYTHON_VARIABLE}", values.get(PYTHON_VARIABLE))):
        if named:
            found = shutil.which(expand_user(named))
            if found is None:
                raise NotFound(f"{origin} {str(named)!r} is not a program; give the path of a Python that has vLLM")
            # Not resolved: an interpreter finds its virtual environment by the link.
            return _check_vllm(Path(found).absolute(), origin)
    if OWN_PYTHON.exists():
        return _check_vllm(OWN_PYTHON, "that of `make vllm`")
    return _check_vllm(Path(sys.executable), "the one that runs this program")


def _check_vllm(python: Path, origin: str) -> Path:
    if python == Path(sys.executable):
        has_it = importlib.util.find_spec("vllm") is not None
    else:
        code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        try:
            has_it = subprocess.run([python, "-c", code], capture_output=True, timeout=120).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            has_it = False
    if not has_it:
        raise Unavailable(
            f"vLLM is not installed in {str(python)!r} ({origin}): {INSTALL}, or name an interpreter that has it "
            "with --vllm-python"
        )
    return python
