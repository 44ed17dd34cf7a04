"""Check that the GPU computes what the CPU computes, and time it. Needs a CUDA device.

    python benchmarks/gpu_check.py [--width 768 --latents 32768 --k 32 --batch 8192 --seeds 3] [--json] [--out x.json]

Tests run the programs in Triton's interpreter. A processor can still differ: in sizes past 2^31, order, rounding or
memory. So every sparse step runs at real sizes on both sides and is compared, and runs twice on the GPU, which must
give the same bits. Deviations are relative to the largest number of the CPU's result. Times are medians, of the GPU
alone. The last line compares a whole training step with the dense product it contains.

Exits with 1 if anything deviates too much. Results go to ``benchmarks/results/gpu-check.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.kernels import cpu
from sae.dictionaries.kernels.steps import Kernels, triton_kernels
from sae.dictionaries.sae import AuxK, Objective
from sae.training.stacked import Stack

RESULTS = Path(__file__).parent / "results" / "gpu-check.json"
_FLOAT = 2e-5  # float32 sums of some thousand terms, added in another order


@dataclass(frozen=True)
class Sizes:
    width: int
    latents: int
    k: int
    batch: int
    seeds: int


@dataclass
class Row:
    """One comparison."""

    name: str
    deviation: float
    """the largest, relative to the largest number; for choices the share of slots that are others"""
    allowed: float
    repeatable: bool
    milliseconds: float | None = None

    @property
    def good(self) -> bool:
        return self.repeatable and self.deviation <= self.allowed


class Check:
    """The comparisons, one after the other. ``kernels`` are those of ``device``."""

    def __init__(self, kernels: Kernels, device: torch.device, sizes: Sizes) -> None:
        self.kernels, self.device, self.sizes = kernels, device, sizes
        self.rows: list[Row] = []
        self.times: dict[str, float] = {}
        self._generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self._generator)

    def compare(
        self, name: str, work: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor], allowed: float = _FLOAT
    ) -> None:
        """``work`` on the device against what it is ``expected`` to give (``expected`` may lack the last results)."""
        found, again = work(), work()
        pairs = list(zip(found, expected, strict=False))
        self._add(name, max(deviation(ours.cpu(), theirs) for ours, theirs in pairs), allowed, found, again, work)

    def choices(self, name: str, work: Callable[[], Sequence[Tensor]], expected: Tensor, allowed: float = 0.0) -> None:
        """Like :meth:`compare` for slots; ``expected`` are the values [S, B, K] chosen on the CPU, in any order."""
        found, again = work(), work()
        ours = found[0].cpu().sort(-1).values
        others = float((ours != expected.sort(-1).values).double().mean())
        self._add(name, others, allowed, found, again, work)

    def _add(
        self, name: str, off: float, allowed: float, found: Sequence[Tensor], again: Sequence[Tensor], work: Any
    ) -> None:
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, again, strict=True))
        del found, again
        self.rows.append(Row(name, off, allowed, same, self.time(work)))

    def time(self, work: Callable[[], object], repeats: int = 7) -> float:
        """Median milliseconds."""
        found = []
        for _ in range(repeats):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            found.append((time.perf_counter() - begun) * 1e3)
        return statistics.median(found)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------------------------------------- the checks

    def topk(self) -> None:
        s = self.sizes
        # Row lengths that no block divides, long ones, many slots of short ones.
        for m, k in ((s.latents, s.k), (s.latents - 1, s.k), (4 * s.latents, s.k), (s.latents // 10 + 3, 12 * s.k)):
            for dtype in (torch.float32, torch.bfloat16):
                pre = self.random(s.seeds, min(s.batch, 1024), m).to(dtype)
                self._topk(f"top-{k} of {m}, {str(dtype).removeprefix('torch.')}", pre, k)
        pre = self.random(s.seeds, min(s.batch, 64), s.latents).round()
        pre[:, ::3] -= 4  # few of them positive
        pre[:, 1::3] = 0.5
        self._topk(f"top-{s.k} of {s.latents}, ties", pre, s.k)

    def _topk(self, name: str, pre: Tensor, k: int) -> None:
        expected = torch.stack([cpu.topk(of_seed, k)[0] for of_seed in pre.cpu().float()])
        self.choices(name, lambda: self.kernels.topk(pre, k), expected)
        values, latents = self.kernels.topk(pre, k)
        if not torch.equal(torch.where(values > 0, pre.float().gather(-1, latents), 0), values):
            self.rows[-1].deviation = float("inf")  # the values are right, but not of these latents

    def rounded_topk(self) -> None:
        s = self.sizes
        centred, weight = self.random(s.seeds, min(s.batch, 1024), s.width), self.random(s.seeds, s.latents, s.width)
        bias = self.random(s.seeds, s.latents)
        near = torch.bmm(centred.bfloat16(), weight.bfloat16().mT) + bias[:, None].bfloat16()
        host = zip(centred.cpu(), weight.cpu(), bias.cpu(), strict=True)
        expected = torch.stack([cpu.topk(torch.addmm(b, c, w.T), s.k)[0] for c, w, b in host])

        def work() -> list[Tensor]:
            return [self.kernels.rounded_topk(near, centred, weight, bias, s.k)[0].sort(-1).values]

        # A latent that bfloat16 took for another is nearly as active as that one.
        self.compare("rounded top-k (and sorting)", work, [expected.sort(-1).values], 0.02)

    def sparse_steps(self) -> None:
        s = self.sizes
        weight, bias = self.random(s.seeds, s.latents, s.width), self.random(s.seeds, s.width)
        x = self.random(s.batch, s.width)
        activations = self.random(s.seeds, s.batch, s.k).relu()
        latents = torch.randint(s.latents, activations.shape, device=self.device, generator=self._generator)
        activations[:, ::2, 0], latents[:, ::2, 0] = 1.0, 7  # one latent fires for every other token
        latents *= activations > 0
        slots = activations, latents, weight, bias
        decoded = [cpu.decode(a, i, w, b) for a, i, w, b in self._host(*slots)]
        self.compare("decode", lambda: [self.kernels.decode(*slots)], [torch.stack(decoded)])
        errors = [cpu.residuals(a, i, w, b, x.cpu()) for a, i, w, b in self._host(*slots)]
        expected = [torch.stack(same) for same in zip(*errors, strict=True)]
        self.compare("residuals", lambda: self.kernels.residuals(*slots, x), expected)
        residual, products, _ = self.kernels.residuals(*slots, x)
        inputs = activations, products, latents, residual, x - bias[:, None]
        sums = [cpu.weight_gradients(a, p, i, r, c, 0.3, s.latents) for a, p, i, r, c in self._host(*inputs)]
        expected = [torch.stack(same) for same in zip(*sums, strict=True)]
        # The latent that always fires sums thousands of terms.
        self.compare("weight gradients", lambda: self.kernels.weight_gradients(*inputs, 0.3, s.latents), expected, 2e-4)

    def _host(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tensors of each seed in main memory."""
        return zip(*(t.cpu() for t in tensors), strict=True)

    def adam(self) -> None:
        s = self.sizes
        for unit_rows, shape in ((True, (s.seeds, s.latents, s.width)), (False, (s.seeds, s.latents))):
            start = [self.random(*shape), self.random(*shape), self.random(*shape) / 10, self.random(*shape).square()]
            if unit_rows:
                start[0] = torch.nn.functional.normalize(start[0], dim=-1)
            host = [(t.flatten(0, -2) if unit_rows else t.flatten()).cpu().clone() for t in start]
            cpu.adam(*host, step=3, rate=1e-3, unit_rows=unit_rows)

            def work(start: list[Tensor] = start, unit_rows: bool = unit_rows) -> list[Tensor]:
                w, g, m, v = (t.clone() for t in start)
                self.kernels.adam(w, g, m, v, step=3, rate=1e-3, unit_rows=unit_rows)
                return [w, m, v]

            expected = [host[i].view(shape) for i in (0, 2, 3)]
            self.compare(f"Adam, {'unit rows' if unit_rows else 'plain'} (with copies)", work, expected)

    def beyond_32_bits(self) -> None:
        """Rows whose first element's number does not fit into 32 bits; skipped if memory is short."""
        s = self.sizes
        m = (2**31 + 2**28) // (s.seeds * s.width) + 1
        if self.device.type != "cuda" or torch.cuda.mem_get_info(self.device)[0] < 6 * s.seeds * m * s.width:
            return
        self._decode_far(m)
        self._topk_far((2**31 + 2**28) // s.latents + 1)

    def _decode_far(self, m: int) -> None:
        s = self.sizes
        weight, bias = torch.zeros(s.seeds, m, s.width, device=self.device), self.random(s.seeds, s.width)
        weight[:, -4:] = self.random(s.seeds, 4, s.width)
        latents = m - 1 - torch.arange(4, device=self.device).expand(s.seeds, 2, 4).contiguous()
        activations = self.random(s.seeds, 2, 4).abs()
        expected = bias.cpu()[:, None] + torch.bmm(activations.cpu(), weight[:, -4:].flip(1).cpu())
        self.compare(
            "decode beyond 2^31", lambda: [self.kernels.decode(activations, latents, weight, bias)], [expected]
        )

    def _topk_far(self, rows: int) -> None:
        s = self.sizes
        pre = torch.full((1, rows, s.latents), -1.0, device=self.device, dtype=torch.bfloat16)
        pre[:, -1] = self.random(s.latents).bfloat16()
        expected = cpu.topk(pre[0, -1:].cpu().float(), s.k)[0][None]
        self.choices("top-k beyond 2^31", lambda: [t[:, -1:] for t in self.kernels.topk(pre, s.k)], expected)

    def whole_step(self) -> None:
        """Loss and gradient of all seeds, and the time of a whole step compared with its dense product alone."""
        s = self.sizes
        x = self.random(s.batch, s.width) @ self.random(s.width, s.width) / s.width**0.5 + 1
        sample = x[:1024].cpu()
        host = [TopKSae.init(s.width, s.latents, s.k, seed, sample) for seed in range(s.seeds)]
        dead = torch.zeros(s.latents, dtype=torch.bool)
        dead[: s.latents // 50] = True
        variance = float((x - x.mean(0)).square().sum(dtype=torch.float64))
        alone = []
        for sae in host:
            sae.b_enc[dead] -= 0.1
            objective = Objective(variance, s.batch, AuxK(dead, s.width // 2, 1 / 32))
            alone.append(sae.loss_and_gradient(x.cpu(), objective))
        stack = Stack([copy(sae, self.device) for sae in host], self.kernels)
        auxk = AuxK(dead.to(self.device), s.width // 2, 1 / 32)
        for precision, allowed in (("float32", 2e-2), ("bfloat16", 1e-1)):
            # Choices between latents that are nearly equal fall either way. The loss hardly knows of it; a gradient
            # in which a share f of the slots belongs to other latents is off by the square root of 2 f.
            objectives = [Objective(variance, s.batch, auxk, precision=precision)] * s.seeds  # type: ignore[arg-type]

            def losses(objectives: list[Objective] = objectives) -> list[Tensor]:
                return [t for loss, _ in stack.loss_and_gradient(x, objectives) for t in (loss.fvu, loss.auxk)]

            def gradients(objectives: list[Objective] = objectives) -> list[Tensor]:
                return [g for _, of in stack.loss_and_gradient(x, objectives) for g in of.values()]

            self.compare(f"losses, {precision}", losses, [t for loss, _ in alone for t in (loss.fvu, loss.auxk)], 1e-3)
            found, again = gradients(), gradients()
            expected = [g for _, of in alone for g in of.values()]
            off = max(distance(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True))
            self._add(f"gradients with AuxK, {precision}", off, allowed, found, again, gradients)
            del found, again
            self._timed_step(stack, x, variance, precision)

    def _timed_step(self, stack: Stack, x: Tensor, variance: float, precision: str) -> None:
        s = self.sizes
        kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
        objectives = [Objective(variance, s.batch, precision=precision)] * s.seeds  # type: ignore[arg-type]
        moments = {name: [torch.zeros_like(w) for _ in range(2)] for name, w in stack.weights.items()}

        def step() -> None:
            found = stack.loss_and_gradient(x, objectives)
            for seed, (_, gradient) in enumerate(found):
                for name, g in gradient.items():
                    w, first, second = stack.weights[name][seed], moments[name][0][seed], moments[name][1][seed]
                    self.kernels.adam(w, g, first, second, step=1, rate=1e-6, unit_rows=name == "W_dec")

        rows = min(s.batch, 2048)
        a, b = x[:rows].to(kind), stack.weights["W_enc"][0].to(kind)
        out = torch.empty(rows, s.latents, device=self.device, dtype=kind)
        product = self.time(lambda: torch.mm(a, b.T, out=out)) * s.seeds * s.batch / rows
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        whole = self.time(step)
        self.times[f"step, {precision} (ms)"] = whole
        self.times[f"dense product alone, {precision} (ms)"] = product
        self.times[f"share of the product's speed, {precision}"] = product / whole
        self.times[f"token·seeds per second, {precision}"] = s.batch * s.seeds / whole * 1e3
        if self.device.type == "cuda":
            self.times[f"peak memory, {precision} (MiB)"] = torch.cuda.max_memory_allocated(self.device) / 2**20

    def all(self) -> None:
        for check in (self.topk, self.rounded_topk, self.sparse_steps, self.adam, self.beyond_32_bits, self.whole_step):
            check()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number of ``theirs``; infinite where either is not finite."""
    off = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-300)
    return float(off) if bool(torch.isfinite(off)) else float("inf")


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The length of the difference, relative to the length of ``theirs``."""
    off = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-300)
    return float(off) if bool(torch.isfinite(off)) else float("inf")


def copy(sae: TopKSae, device: torch.device) -> TopKSae:
    weights = {name: t.clone() for name, t in sae.parameters().items()}
    return TopKSae(**weights, k=sae.k).to(device)


def show(check: Check) -> None:
    table = Table(title="GPU against CPU")
    for column in ("step", "deviation", "allowed", "same bits again", "ms", ""):
        table.add_column(column)
    for row in check.rows:
        took = "" if row.milliseconds is None else f"{row.milliseconds:.2f}"
        bits, verdict = "yes" if row.repeatable else "NO", "" if row.good else "DEVIATES"
        table.add_row(row.name, f"{row.deviation:.1e}", f"{row.allowed:.0e}", bits, took, verdict)
    console = Console()
    console.print(table)
    for name, value in check.times.items():
        console.print(f"{name}: {value:,.2f}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 768), ("latents", 32768), ("k", 32), ("batch", 8192), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here; run this on a machine that has one", file=sys.stderr)
        return 1
    kernels = triton_kernels()
    if kernels is None:
        print("error: Triton is not installed; give: pip install triton", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = Sizes(arguments.width, arguments.latents, arguments.k, arguments.batch, arguments.seeds)
    check = Check(kernels, device, sizes)
    check.all()
    import triton

    record = {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sizes": asdict(sizes),
        "rows": [{**asdict(row), "good": row.good} for row in check.rows],
        "times": check.times,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(record))
    else:
        show(check)
    return 0 if all(row.good for row in check.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
