"""A language model cut at a hookpoint: tokens in, activations out.

The trunk alone is loaded (no output head), and the forward pass is ended by the hook itself once the last
hookpoint asked for has answered: at layer 6 of 12 that halves the work, and it needs no knowledge of any
architecture. Which modules can be hookpoints is likewise not looked up but tried out: those that give one
vector for each token when a few tokens are run.

A checkpoint may bring Python code of its own (``auto_map`` in its JSON files). It is never run, and nobody is asked
whether it should be: a model or tokenizer that transformers has no class for is refused.

Many tokenizers put a beginning-of-text token before a text. The model then expects it, and its activations
are unlike any other's; so it is put in front for the forward pass, and its position is dropped.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.activations.bundled import BUNDLED
from sae.activations.hookpoint_names import likely_hookpoints
from sae.common.errors import BadInput, NotFound, UserError, join_or, suggest
from sae.common.files import digest, digest_samples, read_json
from sae.common.hub import Kind, find_on_hub, first_line, looks_like_path
from sae.common.memory import is_out_of_memory
from sae.common.precision import resolve_float, warn_if_emulated

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = (".safetensors", ".bin")


def load_tokenizer(source: str) -> tuple[Any, str]:
    """The tokenizer of a model folder, hub name or ``'bundled'``, and its fingerprint; no weights are read.

    Raises:
        NotFound, BadInput: there is no such model, or it has no usable tokenizer.
        Unavailable: the hub cannot be reached and the name is not cached.
    """
    place, arguments = _locate(source)
    return _tokenizer_at(source, place, arguments)


def _tokenizer_at(source: str, place: str, arguments: dict[str, Any]) -> tuple[Any, str]:
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **arguments)
        except Exception as error:  # a damaged file surfaces as whatever its parser raises
            if _auto_map(place, "tokenizer_config.json", arguments):
                raise _own_code(source, "tokenizer", "tokenizer_config.json") from None
            raise BadInput(f"model {source!r} has no usable tokenizer: {first_line(error)}") from None
    if len(tokenizer) == 0:
        raise BadInput(f"model {source!r} has no tokenizer files; add tokenizer.json beside its weights")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return tokenizer, digest([rules, sorted(tokenizer.all_special_ids), tokenizer.eos_token_id])


class Subject:
    """A language model's trunk, frozen, in evaluation mode.

    Attributes:
        source: the name it was asked for by.
        fingerprint: SHA-256 over its configuration and samples of its weights, 64 hex characters.
        tokenizer, tokenizer_fingerprint: what :func:`load_tokenizer` gives.
        model: the trunk, without the output head.
        device, dtype: where and in which precision it computes.
        prefix: the token ids that the tokenizer puts before a text (usually none or a BOS).
    """

    def __init__(self, source: str, model: Any, tokenizer: Any, fingerprint: str, tokenizer_fingerprint: str) -> None:
        self.source = source
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.prefix = _prefix(tokenizer)

    @classmethod
    def load(cls, source: str, device: str = "cpu", dtype: str = "auto") -> Subject:
        """Load a model folder, a hub name (``name@revision`` for other than its default) or ``'bundled'``.

        ``dtype`` is one of ``DTYPES``, or "auto": bfloat16 where ``device`` multiplies it, else float32.

        Raises:
            NotFound, BadInput: no such model, no checkpoint, damaged or incomplete weights, no usable tokenizer.
            Unavailable: the hub cannot be reached and the name is not cached.
        """
        from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel

        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise BadInput(f"model {source!r} cannot be put on {device!r}: {first_line(error)}") from None
        if dtype == "auto":
            dtype = resolve_float("auto", device)
        if dtype not in DTYPES:
            raise BadInput(f"subject.dtype {dtype!r} is not known; choose {suggest(dtype, DTYPES)}")
        place, arguments = _locate(source)
        with _quiet():
            try:
                config = AutoConfig.from_pretrained(place, trust_remote_code=False, **arguments)
            except Exception as error:  # a damaged file surfaces as whatever its parser raises
                if _auto_map(place, "config.json", arguments, unless_known=CONFIG_MAPPING):
                    raise _own_code(source, "model", "config.json") from None
                raise BadInput(f"model {source!r} has no usable config.json: {first_line(error)}") from None
            if getattr(config, "auto_map", None) and type(config) not in MODEL_MAPPING:
                raise _own_code(source, "model", "config.json")
            if config.is_encoder_decoder:
                raise BadInput(f"model {source!r} is an encoder-decoder; give a decoder-only language model")
            try:
                model, report = AutoModel.from_pretrained(
                    place,
                    config=config,
                    dtype=DTYPES[dtype],
                    output_loading_info=True,
                    trust_remote_code=False,
                    **arguments,
                )
            except Exception as error:  # as above: safetensors, torch, the hub and the model each have their own
                raise BadInput(
                    f"model {source!r} cannot be loaded: {first_line(error)}; fetch its files again"
                ) from None
        absent = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if absent:
            raise BadInput(
                f"model {source!r} lacks {len(absent)} of its weights ({absent[0]} among them); fetch its files again"
            )
        warn_if_emulated("subject.dtype", dtype, device)
        tokenizer, tokenizer_fingerprint = _tokenizer_at(source, place, arguments)
        fingerprint = _fingerprint(place, arguments)
        try:
            model = model.to(device).eval().requires_grad_(False)
        except (RuntimeError, AssertionError) as error:
            raise BadInput(f"model {source!r} cannot be put on {device!r}: {first_line(error)}") from None
        return cls(source, model, tokenizer, fingerprint, tokenizer_fingerprint)

    # --- hookpoints ---------------------------------------------------------------------------------------

    def hookpoints(self) -> list[str]:
        """The modules whose output can be studied, in the order in which they compute."""
        return list(self._widths)

    def width(self, hookpoint: str) -> int:
        """D, the length of the vector that the hookpoint gives for a token."""
        return self._widths[self.resolve(hookpoint)]

    def resolve(self, name: str) -> str:
        """A hookpoint's one name: the module's path in the trunk, such as ``layers.2.mlp``.

        Also understood is the path in the whole model (``gpt_neox.layers.2.mlp``, ``model.layers.2.mlp``).
        Raises :class:`NotFound`, with the nearest names, for any other.
        """
        trunk = self.model.base_model_prefix
        candidates = [name, name.removeprefix(f"{trunk}."), name.removeprefix("model.")]
        for candidate in candidates:
            if candidate in self._widths:
                return candidate
        known = dict(self.model.named_modules())
        if name in known:
            raise BadInput(
                f"hookpoint {name!r} of model {self.source!r} does not give one vector per token; "
                f"choose for example {self._likely(name)}"
            )
        raise NotFound(f"model {self.source!r} has no hookpoint {name!r}; did you mean {self._likely(name)}?")

    def _likely(self, name: str) -> str:
        """Hookpoints that a wrong name may mean, as words for an error message."""
        known = self.hookpoints()
        return join_or(likely_hookpoints(name, known)) or suggest(name, known)

    @functools.cached_property
    def _widths(self) -> dict[str, int]:
        n, t = 3, 5  # two sizes that no module has by chance as its own
        found: dict[str, int] = {}
        handles = []

        def hook_for(name: str) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                value = _first(output)
                if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[:2] == (n, t):
                    found.setdefault(name, value.shape[2])

            return hook

        for name, module in self.model.named_modules():
            if name:
                handles.append(module.register_forward_hook(hook_for(name)))
        try:
            self._forward(torch.arange(n * t).reshape(n, t).to(self.device) % 7)
        finally:
            for handle in handles:
                handle.remove()
        return found

    # --- activations --------------------------------------------------------------------------------------

    def activations(self, tokens: np.ndarray | torch.Tensor, hookpoints: Sequence[str]) -> dict[str, torch.Tensor]:
        """One forward pass over ``tokens [n, T]`` (int64), as far as the last of ``hookpoints``.

        Returns for each hookpoint, under the name given, ``[n, T, D]`` in the model's precision on its device.
        Raises :class:`BadInput` for a token the model does not know, or more of them than it has positions.
        """
        ids = torch.as_tensor(tokens, dtype=torch.long)
        self.check_context(ids.shape[1])
        self._check_vocabulary(ids)
        wanted = {name: self.resolve(name) for name in hookpoints}
        found: dict[str, torch.Tensor] = {}
        awaited = set(wanted.values())
        handles = []

        def hook_for(module_name: str) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                if module_name not in found:
                    found[module_name] = _first(output)
                    if len(found) == len(awaited):
                        raise _Enough
                    # The pass goes on, and some models add to this very tensor in place.
                    found[module_name] = found[module_name].clone()

            return hook

        for module_name in awaited:
            handles.append(self.model.get_submodule(module_name).register_forward_hook(hook_for(module_name)))
        if self.prefix:
            front = torch.tensor(self.prefix).expand(len(ids), -1)
            ids = torch.cat([front, ids], dim=1)
        try:
            self._forward(ids.to(self.device))
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {name: found[module_name][:, len(self.prefix) :] for name, module_name in wanted.items()}

    @torch.no_grad()  # not inference_mode: its tensors cannot be an SAE's training input
    def _forward(self, ids: torch.Tensor) -> None:
        try:
            self.model(input_ids=ids, use_cache=False)
        except _Enough:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise UserError(
                    f"model {self.source!r} runs out of memory on {self.device} with {ids.numel()} tokens at once; "
                    "use a smaller model, subject.dtype bfloat16, or another --device"
                ) from None
            raise UserError(f"model {self.source!r} fails on plain token ids: {first_line(error)}") from error

    def check_context(self, context: int) -> None:
        """Raise :class:`BadInput` where sequences of T = ``context`` tokens do not fit the model's positions."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions and context + len(self.prefix) > positions:
            raise BadInput(
                f"model {self.source!r} has {positions} positions, and a sequence takes {context + len(self.prefix)}; "
                f"lower corpus.context to {positions - len(self.prefix)} or less"
            )

    def _check_vocabulary(self, ids: torch.Tensor) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        if ids.numel() and int(ids.max()) >= rows:
            raise BadInput(
                f"token {int(ids.max())} is beyond the {rows} that model {self.source!r} knows; "
                "the corpus was made with another model's tokenizer"
            )


class _Enough(Exception):
    """Raised by a hook to end the forward pass once every hookpoint has answered."""


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, found by comparing with and without its special tokens."""
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a b")["input_ids"]
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return list(dressed[:start])
    return []


# --- finding a model --------------------------------------------------------------------------------------


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is to be given for ``source``: a folder or hub name, and further arguments."""
    if source == "bundled":
        if not (BUNDLED / "config.json").is_file():
            raise NotFound(
                f"the bundled model is not in {str(BUNDLED)!r}; restore it from the repository, "
                "or train it with `python -m sae.activations.bundled.build`"
            )
        return str(BUNDLED), {"local_files_only": True}
    if not source or (looks_like_path(source) and not Path(source).expanduser().exists()):
        raise NotFound(f"model {source!r} does not exist; give a folder, a hub name or 'bundled'")
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(
                f"{source!r} is a folder but no model: it has no config.json; give a Hugging Face checkpoint"
            )
        return str(path), {"local_files_only": True}
    if path.exists():
        raise BadInput(f"model {source!r} is a file; give the folder that holds config.json and the weights")
    found = find_on_hub(source, Kind.MODEL)
    return found.name, found.arguments()


def _auto_map(place: str, file: str, arguments: dict[str, Any], unless_known: Container[str] = ()) -> bool:
    """Return whether a JSON file of the model names Python code of the model's own.

    False where the file says a ``model_type`` that is among ``unless_known``, and where it cannot be read.
    """
    from transformers.utils import cached_file

    try:
        found = read_json(Path(str(cached_file(place, file, **arguments))))
        return bool(found.get("auto_map")) and found.get("model_type") not in unless_known
    except Exception:  # the caller has an error to report already
        return False


def _own_code(source: str, part: str, file: str) -> BadInput:
    return BadInput(
        f"model {source!r} brings its own Python code for its {part} (auto_map in its {file}), and such code is never "
        f"run; give a model whose {part} class is part of transformers"
    )


def _fingerprint(place: str, arguments: dict[str, Any]) -> str:
    """SHA-256 over the configuration and, of each weight file, name, size and bytes at evenly spaced places:
    enough to notice other weights in a time that does not grow with them."""
    from transformers.utils import cached_file

    folder = Path(place)
    if not folder.is_dir():
        folder = Path(str(cached_file(place, "config.json", **arguments))).parent
    config = {
        k: v for k, v in read_json(folder / "config.json").items() if k not in ("transformers_version", "_name_or_path")
    }
    weights = [p for p in sorted(folder.iterdir()) if p.suffix in _WEIGHTS]
    return digest([config, [[p.name, p.stat().st_size, digest_samples(p)] for p in weights]])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and advice while they load; restored afterwards."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if not hub_bars:
            enable_progress_bars()
