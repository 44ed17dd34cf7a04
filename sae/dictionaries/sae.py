"""A sparse autoencoder (SAE) of the activations at a hookpoint. ``architectures/`` holds the variants.

Every architecture exposes encoder and decoder directions under the same four names and shapes, by which seeds are
compared. Activations are passed on as K slots per token, never as a B x M matrix. Gradients are worked out by hand,
because automatic differentiation would keep that matrix.

With residual r = x_hat - x and total variance V = sum ||x - mean(x)||^2 of the batch, the training loss is

    FVU + alpha * AuxK + lambda * S + G,   FVU = sum ||r||^2 / V

AuxK, or another term in its place, revives dead latents (``sae.dictionaries.gradients``). S is the architecture's
sparsity term, a mean over tokens (none in TopK and BatchTopK). G is any further term (Gated's auxiliary
reconstruction). V and the number of tokens are given, so that the gradients of parts of a batch add up.

A transcoder reads the activations x at one hookpoint and predicts those y at another (Dunefsky et al. 2024, arXiv
2406.11944). Then r = y_hat - y, V is that of y, decoder rows lie in the space of y, and the encoder reads x itself in
place of x - b_dec. A skip connection adds x W_skip^T to y_hat (Paulo et al. 2025, arXiv 2501.18823). An autoencoder is
the case y = x.

Activations are not rescaled. Numbers with their unit are measured in sqrt(V / B), the root mean square distance of a
token from the mean, so that lambda and the bandwidth mean the same for every hookpoint.

Legend: B batch, D model width (d_in; d_out of a transcoder's target), M latents, K active latents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from sae.common.errors import BadInput
from sae.common.precision import Precision
from sae.common.ranks import ALONE, Job
from sae.dictionaries.kernels.steps import kernels_for


class Firings(NamedTuple):
    """The latents that fire for each token, and how strongly."""

    activations: Tensor  # [B, K] strictly positive; 0 marks an empty slot
    indices: Tensor  # [B, K] int64 latent of each slot, in no particular order; 0 in an empty slot


class AuxK(NamedTuple):
    """The auxiliary loss of one step (Gao et al. 2024, appendix A.2)."""

    dead: Tensor  # [M] bool: the latents that it revives
    k: int  # dead latents per token in the reconstruction of the error, at most
    coefficient: float  # alpha


class Objective(NamedTuple):
    """The loss of one step."""

    variance: float  # V, of the whole batch
    tokens: int  # B, of the whole batch
    auxk: AuxK | None = None
    sparsity: float = 0.0  # lambda; unused by architectures that choose by rank
    bandwidth: float = 0.01  # epsilon of JumpReLU's estimators, in units of ``unit``
    precision: Precision = "float32"  # of the dense encoder product; activations and gradients are never rounded
    job: Job = ALONE  # the processes that share the batch, for architectures that choose among all of its tokens
    target: Tensor | None = None  # [B, D_out] y of a transcoder, for the rows of x; None: x

    @property
    def unit(self) -> float:
        """sqrt(V / B), the root mean square distance of a token's activations from their mean."""
        return math.sqrt(self.variance / self.tokens)


class Loss(NamedTuple):
    """The loss of one batch, before the step; float64 scalars on the weights' device."""

    fvu: Tensor
    auxk: Tensor  # without its coefficient; P for architectures with a penalty; 0 without a dead latent
    sparsity: Tensor  # S, without its coefficient; 0 for architectures without it
    firings: Tensor  # [M] int64: tokens of the batch for which each latent fires
    other: Tensor | None = None  # G; None for architectures without it
    least: Tensor | None = None  # the smallest activation among the firings, if the architecture uses it


class Sae(ABC):
    """An SAE of any architecture: four weights, an encoder and a decoder.

    ``W_enc`` [M, D], ``b_enc`` [M], ``W_dec`` [M, D] and ``b_dec`` [D] have one dtype and one device, without autograd.
    In a transcoder (:meth:`as_transcoder`) the last two have the width D_out, and ``W_skip`` [D_out, D] may be a fifth.
    """

    transcodes: bool = False  # reads one hookpoint and predicts another
    W_skip: Tensor | None = None

    architecture: ClassVar[str]
    penalised: ClassVar[bool] = False  # a sparsity term decides how many fire: training finds its coefficient
    gradients_at_once: ClassVar[int] = 2  # gradients as large as the weights that a step holds; 1: in one piece
    slots_per_k: ClassVar[int] = 8  # most slots of a token held for the whole batch, in units of k; 0: by pieces

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int | None) -> None:
        """``k`` is the number of latents that fire per token, or the average that training aims at; None if unknown."""
        num_latents, d_in = W_enc.shape
        for name, tensor, shape in (
            ("b_enc", b_enc, (num_latents,)),
            ("W_dec", W_dec, (num_latents, W_dec.shape[-1])),
            ("b_dec", b_dec, (W_dec.shape[-1],)),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with W_enc {tuple(W_enc.shape)}: {shape}")
        self.transcodes = W_dec.shape[1] != d_in
        if k is not None and not 1 <= k <= num_latents:
            raise ValueError(f"k = {k} is not between 1 and the number of latents, {num_latents}")
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (t.contiguous() for t in (W_enc, b_enc, W_dec, b_dec))
        self.k = k

    @property
    def d_in(self) -> int:
        """D, the width of the activations."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """D_out, the width of the reconstruction."""
        return self.W_dec.shape[1]

    @property
    def num_latents(self) -> int:
        """M, the width of the dictionary."""
        return self.W_enc.shape[0]

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def parameters(self) -> dict[str, Tensor]:
        """Return the tensors that training changes by gradient, by name, not copied."""
        skip = {} if self.W_skip is None else {"W_skip": self.W_skip}
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec, **skip}

    def weights(self) -> dict[str, Tensor]:
        """Return all tensors that define the dictionary: the parameters, and those that training only measures."""
        return self.parameters()

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor], k: int | None, transcodes: bool = False) -> Self:
        """Build a dictionary from its :meth:`weights`, under the names of the constructor's arguments."""
        build: Callable[..., Self] = cls
        sae = build(**{name: weight for name, weight in weights.items() if name != "W_skip"}, k=k)
        return sae.as_transcoder(weights.get("W_skip")) if transcodes or "W_skip" in weights else sae

    def as_transcoder(self, W_skip: Tensor | None = None) -> Self:
        """Make this a transcoder, in place, with the skip connection ``W_skip`` [D_out, D] if given."""
        if W_skip is not None and tuple(W_skip.shape) != (self.d_out, self.d_in):
            raise ValueError(f"W_skip has shape {tuple(W_skip.shape)}; it maps {self.d_in} to {self.d_out}")
        self.transcodes, self.W_skip = True, None if W_skip is None else W_skip.contiguous()
        return self

    def as_known(self) -> Sae | None:
        """Return a dictionary that computes the same and that other programs support, for export; None without one."""
        return None

    def measure(self, loss: Loss, step: int) -> None:  # noqa: B027 - most architectures measure nothing
        """Update the tensors that training measures. Called after each update, with the step's number from 0."""

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the weights, in place, and return ``self``. ``dtype`` is float32 or float64."""
        for name, tensor in self.weights().items():
            setattr(self, name, tensor.to(device=device, dtype=dtype))
        return self

    @classmethod
    def init(cls, d_in: int, num_latents: int, k: int, seed: int, x_sample: Tensor | None = None) -> Self:
        """Make a dictionary to train, in float32 in main memory, with an encoder drawn from ``seed``.

        ``k`` is the number of latents that should fire per token; ``b_dec`` is computed from ``x_sample`` [N, D].
        """
        return cls.of_weights(draw_weights(d_in, num_latents, seed, x_sample), k)

    @abstractmethod
    def loss_and_gradient(self, x: Tensor, objective: Objective) -> tuple[Loss, dict[str, Tensor]]:
        """Return the training loss on a batch ``x`` [B, D], and its gradient under the names of :meth:`parameters`.

        The gradient ignores the unit length of decoder rows; the update takes it into account.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Firings:
        """Return the firings of activations ``x`` [B, D], of any float dtype."""

    def encode_fast(self, x: Tensor) -> Firings:
        """Return :meth:`encode` with the fastest arithmetic; the last bits of activations may differ."""
        return self.encode(x)

    def decode(self, firings: Firings) -> Tensor:
        """Return the reconstruction [B, D]: ``sum_j a_j W_dec[i_j] + b_dec``, without a skip connection."""
        return kernels_for(self.device).decode(*firings, self.W_dec, self.b_dec)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction of ``x`` [B, D], or a transcoder's prediction [B, D_out] of y."""
        rebuilt = self.decode(self.encode(x))
        if self.W_skip is None:
            return rebuilt
        return rebuilt + x.to(device=self.device, dtype=self.dtype) @ self.W_skip.T

    def target(self, x: Tensor, objective: Objective) -> Tensor:
        """Return what the latents must reconstruct for ``x`` [B, D]: x or y [B, D_out], less the skip connection."""
        y = x if objective.target is None else objective.target
        return y if self.W_skip is None else torch.addmm(y, x, self.W_skip.T, alpha=-1)

    def centred(self, x: Tensor) -> Tensor:
        """Return the encoder's input [B, D] in the weights' dtype: ``x - b_dec``, or ``x`` in a transcoder.

        Raises BadInput if ``x`` has another width.
        """
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise BadInput(
                f"this SAE reads activations of width {self.d_in}, got shape {list(x.shape)}; "
                "use the subject model and hookpoint that it was trained on"
            )
        x = x.to(device=self.device, dtype=self.dtype)
        return x if self.transcodes else x - self.b_dec


def draw_weights(d_in: int, num_latents: int, seed: int, x_sample: Tensor | None) -> dict[str, Tensor]:
    """Return initial W_enc, b_enc, W_dec and b_dec, in float32 in main memory.

    The encoder is drawn from ``seed``, uniform in +-1/sqrt(D), with zero bias; the decoder is the encoder with rows of
    length 1; ``b_dec`` is the geometric median of ``x_sample`` [N, D], of which a few thousand tokens are enough (Gao
    et al. 2024, appendix A.1), or zero without one.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder = (torch.rand(num_latents, d_in, generator=generator) * 2 - 1) * d_in**-0.5
    decoder = torch.nn.functional.normalize(encoder.double(), dim=1).float()
    centre = torch.zeros(d_in) if x_sample is None else geometric_median(x_sample).float().cpu()
    return {"W_enc": encoder, "b_enc": torch.zeros(num_latents), "W_dec": decoder, "b_dec": centre}


def draw_transcoder(
    kind: type[Sae], sizes: tuple[int, int], num_latents: int, k: int, seed: int, skip: bool, y_sample: Tensor | None
) -> Sae:
    """Make a transcoder of ``kind`` to train, for the widths ``sizes`` (D, D_out), as :meth:`Sae.init` does an SAE.

    The encoder is drawn as that of an SAE, decoder rows are random directions, ``b_dec`` is computed from ``y_sample``
    [N, D_out], and the skip connection starts at zero.
    """
    d_in, d_out = sizes
    sae = kind.init(d_in, num_latents, k, seed)
    decoder = torch.randn(num_latents, d_out, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sae.W_dec = torch.nn.functional.normalize(decoder, dim=1).float()
    sae.b_dec = torch.zeros(d_out) if y_sample is None else geometric_median(y_sample).float().cpu()
    return sae.as_transcoder(torch.zeros(d_out, d_in) if skip else None)


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Return the point [D] with the smallest sum of distances to the rows of ``x`` [N, D], in float64.

    Weiszfeld's iteration from the mean, until it moves by less than ``tolerance`` of the spread. Robust to outliers.
    """
    points = x.detach().double()
    centre = points.mean(0)
    spread = (points - centre).norm(dim=1).mean()
    for _ in range(iterations):
        weight = 1 / (points - centre).norm(dim=1).clamp_min(1e-9 * float(spread) + 1e-300)
        moved = (weight[:, None] * points).sum(0) / weight.sum()
        if (moved - centre).norm() <= tolerance * spread:
            return moved
        centre = moved
    return centre


def total_variance(x: Tensor) -> float:
    """Return V, the sum of squared distances of ``x`` [B, D] from its mean; no dictionary changes it."""
    return float((x - x.mean(0)).square().sum(dtype=torch.float64))
