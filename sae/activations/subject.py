"""Run a language model up to a hookpoint: tokens in, activations out.

Only the trunk is loaded, and the forward pass ends at the last hookpoint. A hookpoint is the output of a module
(``layers.3.mlp``) or its input (``layers.3.mlp:in``), if that is one vector per token. Hookpoints are found by running
some tokens, so no architecture is special. Python code that a model brings (``auto_map``) runs only for a user who asks
for it. If the tokenizer adds a BOS, it is used in the forward pass and its position is dropped.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.activations.bundled import BUNDLED
from sae.activations.hookpoint_names import INPUT, likely_hookpoints
from sae.common.errors import BadInput, NotApplicable, NotFound, UserError, join_or, suggest
from sae.common.files import digest, digest_file, digest_samples, expand_user, read_json
from sae.common.hub import find_on_hub, first_line, looks_like_path
from sae.common.memory import is_out_of_memory
from sae.common.precision import resolve_float, warn_if_emulated

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = (".safetensors", ".bin")


def load_tokenizer(source: str) -> tuple[Any, str]:
    """Load a model's tokenizer; return it and its fingerprint. Errors as in :meth:`Subject.load`."""
    place, arguments = _locate(source)
    return _tokenizer_at(source, place, arguments)


def _tokenizer_at(source: str, place: str, arguments: dict[str, Any], trust: bool = False) -> tuple[Any, str]:
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust, **arguments)
        except Exception as error:  # of any parser
            if not trust and _auto_map(place, "tokenizer_config.json", arguments):
                raise _own_code(source, "tokenizer", "tokenizer_config.json") from None
            raise BadInput(f"model {source!r} has no usable tokenizer: {first_line(error)}") from None
    if len(tokenizer) == 0:
        raise BadInput(f"model {source!r} has no tokenizer files; add tokenizer.json to its folder")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return tokenizer, digest([rules, sorted(tokenizer.all_special_ids), tokenizer.eos_token_id])


class Subject:
    """A language model's trunk, frozen, in evaluation mode.

    Attributes:
        source: the name given to :meth:`load`.
        fingerprint: SHA-256 of its configuration and samples of its weights, 64 hex characters.
        prefix: the token ids that the tokenizer puts before a text (usually none or a BOS).
        whole: the model that the trunk belongs to, with its unembedding, if that was loaded too.
    """

    whole: Any = None

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
    def load(
        cls,
        source: str,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        with_unembedding: bool = False,
    ) -> Subject:
        """Load a model folder, a hub name (``name`` or ``name@revision``) or ``'bundled'``.

        ``dtype`` is one of ``DTYPES``, or "auto": bfloat16 if ``device`` has instructions for it, else float32.
        ``trust_remote_code`` runs Python code that comes with the model. ``with_unembedding`` loads all of the model.

        Raises:
            NotFound, BadInput: no such model, damaged or incomplete weights, no usable tokenizer.
            NotApplicable: the unembedding was asked for, and the model has none.
            Unavailable: the hub cannot be reached and the name is not cached.
        """
        from transformers import (
            CONFIG_MAPPING,
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_MAPPING,
            AutoConfig,
            AutoModel,
            AutoModelForCausalLM,
        )

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
                config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **arguments)
            except Exception as error:  # of any parser
                if not trust_remote_code and _auto_map(place, "config.json", arguments, unless_known=CONFIG_MAPPING):
                    raise _own_code(source, "model", "config.json") from None
                raise BadInput(f"model {source!r} has no usable config.json: {first_line(error)}") from None
            if not trust_remote_code and getattr(config, "auto_map", None) and type(config) not in MODEL_MAPPING:
                raise _own_code(source, "model", "config.json")
            if config.is_encoder_decoder:
                raise BadInput(f"model {source!r} is an encoder-decoder; give a decoder-only language model")
            has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
            if with_unembedding and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
                raise NotApplicable(f"model {source!r} predicts no tokens")
            try:
                model, report = (AutoModelForCausalLM if with_unembedding else AutoModel).from_pretrained(
                    place,
                    config=config,
                    dtype=DTYPES[dtype],
                    output_loading_info=True,
                    trust_remote_code=trust_remote_code,
                    **arguments,
                )
            except Exception as error:  # of safetensors, torch, the hub or the model
                why = first_line(error)
                raise BadInput(f"model {source!r} cannot be loaded: {why}; download its files again") from None
        absent = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if with_unembedding and absent and not any(name.startswith(f"{model.base_model_prefix}.") for name in absent):
            raise NotApplicable(f"the files of model {source!r} have no unembedding ({absent[0]})")
        if absent:
            raise BadInput(
                f"model {source!r} lacks {len(absent)} of its weights, such as {absent[0]}; download its files again"
            )
        warn_if_emulated("subject.dtype", dtype, device)
        tokenizer, tokenizer_fingerprint = _tokenizer_at(source, place, arguments, trust_remote_code)
        fingerprint = _fingerprint(place, arguments, trust_remote_code)
        try:
            model = model.to(device).eval().requires_grad_(False)
        except (RuntimeError, AssertionError) as error:
            raise BadInput(f"model {source!r} cannot be put on {device!r}: {first_line(error)}") from None
        trunk = model.base_model if with_unembedding else model
        subject = cls(source, trunk, tokenizer, fingerprint, tokenizer_fingerprint)
        subject.whole = model if with_unembedding else None
        return subject

    def hookpoints(self) -> list[str]:
        """Return the names of all hookpoints, in the order of the forward pass."""
        return list(self._widths)

    def width(self, hookpoint: str) -> int:
        """Return D, the width of a hookpoint's activations."""
        return self._widths[self.resolve(hookpoint)]

    def resolve(self, name: str) -> str:
        """Return the module's path in the trunk (``layers.2.mlp``), with ``:in`` if its input is meant.

        Raises NotFound or BadInput, with suggestions.
        """
        trunk = self.model.base_model_prefix
        for candidate in (name, name.removeprefix(f"{trunk}."), name.removeprefix("model.")):
            if candidate in self._widths:
                return candidate
        if name.removesuffix(INPUT) in dict(self.model.named_modules()):
            verb = "get" if name.endswith(INPUT) else "give"
            raise BadInput(
                f"hookpoint {name!r} of model {self.source!r} does not {verb} one vector per token; "
                f"choose for example {self._suggest(name)}"
            )
        raise NotFound(f"model {self.source!r} has no hookpoint {name!r}; did you mean {self._suggest(name)}?")

    def _suggest(self, name: str) -> str:
        ending = INPUT if name.endswith(INPUT) else ""
        known = [each.removesuffix(ending) for each in self.hookpoints() if each.endswith(INPUT) == bool(ending)]
        place = name.removesuffix(ending)
        likely = [each + ending for each in likely_hookpoints(place, known) if each in known]
        return join_or(likely) or suggest(name, [each + ending for each in known])

    @functools.cached_property
    def _widths(self) -> dict[str, int]:
        n, t = 3, 5  # sizes that no other dimension has by chance
        found: dict[str, int] = {}

        def record(name: str, value: Any) -> None:
            if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[:2] == (n, t):
                found.setdefault(name, value.shape[2])

        modules = [name for name, _ in self.model.named_modules() if name]
        with self._hooked([name + ending for name in modules for ending in (INPUT, "")], record):
            self._forward(torch.arange(n * t).reshape(n, t).to(self.device) % 7)
        return found

    @contextmanager
    def _hooked(self, names: Iterable[str], record: Callable[[str, Any], None]) -> Iterator[None]:
        """Call ``record(name, value)`` for each hookpoint while the block runs; ends early on ``_Enough``."""

        def watch(name: str) -> Any:
            module = self.model.get_submodule(name.removesuffix(INPUT))
            if name.endswith(INPUT):
                return module.register_forward_pre_hook(
                    lambda _m, args, kwargs: record(name, _first_input(args, kwargs)), with_kwargs=True
                )
            return module.register_forward_hook(lambda _m, _i, output: record(name, _first(output)))

        handles = [watch(name) for name in names]
        try:
            yield
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def activations(self, tokens: np.ndarray | torch.Tensor, hookpoints: Sequence[str]) -> dict[str, torch.Tensor]:
        """Run ``tokens`` [n, T] (int64) and return {hookpoint: [n, T, D]} in the model's precision on its device.

        Raises BadInput for unknown tokens and for sequences that are too long.
        """
        ids = torch.as_tensor(tokens, dtype=torch.long)
        self.check_context(ids.shape[1])
        self._check_vocabulary(ids)
        wanted = {name: self.resolve(name) for name in hookpoints}
        found: dict[str, torch.Tensor] = {}
        awaited = set(wanted.values())

        def record(name: str, value: Any) -> None:
            if name not in found:
                found[name] = value
                if len(found) == len(awaited):
                    raise _Enough
                found[name] = found[name].clone()  # some models later add to this tensor in place

        if self.prefix:
            front = torch.tensor(self.prefix).expand(len(ids), -1)
            ids = torch.cat([front, ids], dim=1)
        with self._hooked(awaited, record):
            self._forward(ids.to(self.device))
        return {name: found[module_name][:, len(self.prefix) :] for name, module_name in wanted.items()}

    @torch.no_grad()  # tensors of inference_mode cannot be training input
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
        """Raise BadInput if sequences of T = ``context`` tokens are longer than the model allows."""
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
                f"token {int(ids.max())} is not in the vocabulary of model {self.source!r} ({rows} tokens); "
                "use the model whose tokenizer made the corpus"
            )


class _Enough(Exception):
    """Raised by a hook to end the forward pass after the last hookpoint."""


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first positional tensor that a module gets, else the keyword ``hidden_states``."""
    return next((each for each in args if isinstance(each, torch.Tensor)), kwargs.get("hidden_states"))


def _prefix(tokenizer: Any) -> list[int]:
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a b")["input_ids"]
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return list(dressed[:start])
    return []


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    """Return the arguments of ``from_pretrained`` for ``source``: a folder or hub name, and keyword arguments."""
    if source == "bundled":
        if not (BUNDLED / "config.json").is_file():
            raise NotFound(
                f"the bundled model is not in {str(BUNDLED)!r}; restore it from the repository, "
                "or train it with `python -m sae.activations.bundled.build`"
            )
        return str(BUNDLED), {"local_files_only": True}
    if not source or (looks_like_path(source) and not expand_user(source).exists()):
        raise NotFound(f"model {source!r} does not exist; give a folder, a hub name or 'bundled'")
    path = expand_user(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{source!r} is a folder but no model: it has no config.json; give a Hugging Face model")
        return str(path), {"local_files_only": True}
    if path.exists():
        raise BadInput(f"model {source!r} is a file; give the folder that holds config.json and the weights")
    found = find_on_hub(source, "model")
    return found.name, found.arguments()


def _auto_map(place: str, file: str, arguments: dict[str, Any], unless_known: Container[str] = ()) -> bool:
    """Return whether a JSON file of the model names Python code, unless its ``model_type`` is in ``unless_known``."""
    from transformers.utils import cached_file

    try:
        found = read_json(Path(str(cached_file(place, file, **arguments))))
        return bool(found.get("auto_map")) and found.get("model_type") not in unless_known
    except Exception:  # the caller already has an error to report
        return False


def _own_code(source: str, part: str, file: str) -> BadInput:
    return BadInput(
        f"model {source!r} needs its own Python code for its {part} (auto_map in {file}), which is not run; "
        f"give a model whose {part} class is part of transformers, or --trust-remote-code if you have read that code"
    )


def _fingerprint(place: str, arguments: dict[str, Any], with_code: bool) -> str:
    """Return the SHA-256 of the configuration, of each weight file's name, size and samples, and of any code."""
    from transformers.utils import cached_file

    folder = Path(place)
    if not folder.is_dir():
        folder = Path(str(cached_file(place, "config.json", **arguments))).parent
    config = read_json(folder / "config.json")
    for varying in ("transformers_version", "_name_or_path"):
        config.pop(varying, None)
    weights = [p for p in sorted(folder.iterdir()) if p.suffix in _WEIGHTS]
    code = [[p.name, digest_file(p)] for p in sorted(folder.glob("*.py"))] if with_code else []
    return digest([config, [[p.name, p.stat().st_size, digest_samples(p)] for p in weights], *code])


@contextmanager
def _quiet() -> Iterator[None]:
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
