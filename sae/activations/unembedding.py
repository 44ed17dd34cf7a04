"""Find the linear map from what a hookpoint writes into the residual stream to the model's logits.

The map is the final norm's gain, with the centring of a LayerNorm, followed by the unembedding. No module is known by
its name: the norm is the module whose output the unembedding reads, its gain is measured, and everything is checked on
a few tokens. So a model of any family either passes, or :class:`NotApplicable` says why not.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.activations.hookpoint_names import INPUT
from sae.activations.subject import Subject
from sae.common.errors import NotApplicable

_N, _T = 2, 6  # of the tokens that everything is checked on
_FAR = 1e4  # times a vector of unit RMS: the norm's epsilon no longer matters
_ALIKE = 0.99  # cosine from which on two vectors are the same, in the precision of a model
_ERROR = 0.1  # relative, of the norm's output: rounding and the epsilon
_STEP = 0.02  # of the logits' range: as much as rounding may change their order


class _Call(NamedTuple):
    """One call of a module without children, in the order of the forward pass."""

    module: torch.nn.Module
    input: Any
    output: Any

    @property
    def passes_on(self) -> bool:
        """Whether the module returns its input, as dropout does."""
        both = isinstance(self.input, Tensor) and isinstance(self.output, Tensor)
        return both and torch.equal(self.input, self.output)


class Unembedding:
    """The map from the residual stream to the logits of a model, apart from the scale of the final norm.

    Attributes:
        rows: [V, D] float32: the logit of token t changes by ``rows[t] @ x`` if ``x`` [D] is added to a residual stream
            whose RMS (standard deviation, for a LayerNorm) is 1, and the norm's scale stays the same.
    """

    def __init__(self, subject: Subject) -> None:
        """Find the map in a model loaded with its unembedding. Raises NotApplicable if it has no such map."""
        self._subject, self._name = subject, f"model {subject.source!r}"
        head = subject.whole.get_output_embeddings()
        if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.ndim != 2:
            raise NotApplicable(f"{self._name} has no unembedding")
        embedded = subject.model.get_input_embeddings().weight.any(dim=1).nonzero()[:, 0]  # padding is zero
        self._ids = embedded[torch.arange(_N * _T) % len(embedded)].reshape(_N, _T)
        read: list[Tensor] = []
        with _watch(head, lambda x: read.append(x)):
            self._calls, logits = self._trace()
        if not read:
            raise NotApplicable(f"{self._name} does not use its unembedding")
        self._norm, self._stream = self._find_norm(read[-1])
        gain, is_centred = self._measure_norm(read[-1])
        self._check_logits(read[-1], head, logits)
        self.rows = head.weight.detach().float() * gain
        if is_centred:
            self.rows -= self.rows.mean(dim=1, keepdim=True)

    @torch.no_grad()
    def check_writes(self, hookpoint: str) -> None:
        """Raise NotApplicable unless the hookpoint is added to the residual stream, or part of it, as it is or scaled.

        A vector is added to it while all other modules repeat their outputs: it must arrive at the final norm.
        """
        name = self._subject.resolve(hookpoint)
        says = f"{name} of {self._name} does not write into the residual stream, so that its latents promote no tokens"
        if self._subject.width(name) != self.rows.shape[1]:
            raise NotApplicable(says)
        generator = torch.Generator().manual_seed(0)
        added = torch.randn(self.rows.shape[1], generator=generator).to(self._stream) * _rms(self._stream.flatten())
        arrived: list[Tensor] = []
        with ExitStack() as hooks:
            for module, outputs in self._group_outputs().items():
                hooks.enter_context(_replace(module, functools.partial(_repeat, outputs)))
            module = self._subject.model.get_submodule(name.removesuffix(INPUT))
            replace = _replace_input if name.endswith(INPUT) else _replace
            hooks.enter_context(replace(module, functools.partial(_add, added)))
            hooks.enter_context(_watch(self._norm, lambda x: arrived.append(x)))
            self._subject.whole(input_ids=self._ids, use_cache=False)
        change = (arrived[-1] - self._stream).float()
        if not bool((torch.cosine_similarity(change, added.float(), dim=-1) > _ALIKE).all()):
            raise NotApplicable(says)

    @torch.no_grad()
    def _trace(self) -> tuple[list[_Call], Tensor]:
        """Run the model; return the calls of the trunk's modules without children, and the logits."""
        calls: list[_Call] = []

        def record(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append(_Call(module, _copied(inputs[0] if inputs else None), _copied(output)))

        with ExitStack() as hooks:
            for module in self._subject.model.modules():
                if not any(True for _ in module.children()):
                    hooks.callback(module.register_forward_hook(record).remove)
            logits = self._subject.whole(input_ids=self._ids, use_cache=False).logits
        return calls, logits

    def _find_norm(self, read: Tensor) -> tuple[torch.nn.Module, Tensor]:
        """Return the last module that computed what the unembedding reads, and its input [N, T, D]."""
        for call in reversed(self._calls):
            if not (isinstance(call.output, Tensor) and isinstance(call.input, Tensor)) or call.passes_on:
                continue
            if call.input.shape == read.shape and torch.equal(call.output.reshape(-1), read.reshape(-1)):
                return call.module, call.input
        raise NotApplicable(f"{self._name} has no final norm before its unembedding")

    @torch.no_grad()
    def _measure_norm(self, read: Tensor) -> tuple[Tensor, bool]:
        """Return the norm's gain [D], in float32, and whether it subtracts the mean."""
        norm, width = copy.deepcopy(self._norm).float(), read.shape[-1]
        plain = torch.ones(width, device=read.device)
        plain[::2] = -1
        if width % 2:
            plain[-1] = 2  # the sum stays zero, and no entry is zero
            plain[-3:-1] = -1
        plain /= _rms(plain)

        def apply(x: Tensor) -> Tensor:
            found: Tensor = norm(x.reshape(1, 1, -1)).reshape(-1)
            return found

        bias = apply(torch.zeros_like(plain))
        gain = (apply(plain * _FAR) - bias) / plain
        is_centred = torch.allclose(apply((plain + 1) * _FAR), apply(plain * _FAR), rtol=1e-3, atol=1e-4)
        stream = self._stream.float()
        stream = stream - stream.mean(-1, keepdim=True) if is_centred else stream
        expected = stream / _rms(stream)[..., None] * gain + bias
        if not bool(((expected - read.float()).norm(dim=-1) < _ERROR * read.float().norm(dim=-1)).all()):
            raise NotApplicable(f"the last module of {self._name} is neither a LayerNorm nor an RMSNorm")
        return gain, is_centred

    def _check_logits(self, read: Tensor, head: Any, logits: Tensor) -> None:
        """Raise NotApplicable unless the logits grow with the products; scaling and soft-capping keep the order."""
        order = torch.nn.functional.linear(read, head.weight, getattr(head, "bias", None)).argsort(-1)
        sorted_logits = logits.float().gather(-1, order)
        fallen = sorted_logits.cummax(-1).values - sorted_logits
        if not float(fallen.max()) <= _STEP * float(sorted_logits.max() - sorted_logits.min()):
            raise NotApplicable(f"the logits of {self._name} are not those of its unembedding")

    def _group_outputs(self) -> dict[torch.nn.Module, Iterator[Any]]:
        """Return what each module of the trunk returned, call by call, except the norm and those that pass on."""
        outputs: dict[torch.nn.Module, list[Any]] = {}
        for call in self._calls:
            if call.module is not self._norm and not call.passes_on:
                outputs.setdefault(call.module, []).append(call.output)
        return {module: iter(each) for module, each in outputs.items()}


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean(-1).sqrt()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value  # some models later change it in place


def _repeat(outputs: Iterator[Any], _: Any) -> Any:
    return _copied(next(outputs))


def _add(added: Tensor, output: Any) -> Any:
    return (output[0] + added, *output[1:]) if isinstance(output, tuple | list) else output + added


@contextmanager
def _replace(module: torch.nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _m, _i, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replace_input(module: torch.nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    def changed(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        at = next((i for i, each in enumerate(args) if isinstance(each, Tensor)), None)
        if at is None:
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
        return (*args[:at], change(args[at]), *args[at + 1 :]), kwargs

    handle = module.register_forward_pre_hook(changed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watch(module: Any, record: Callable[[Tensor], None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _m, inputs: record(inputs[0].clone()))
    try:
        yield
    finally:
        handle.remove()
