"""Nothing of size batch x M is kept: the measured peak of a step against the bound that users see."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sae.dictionaries.architectures import ARCHITECTURES

# A process of its own, because a peak does not go down again. The small step first: compiling takes memory too.
_STEP = """
import resource, sys
import torch
from sae.dictionaries.architectures import ARCHITECTURES
from sae.training.memory import Part, training_need
from sae.dictionaries.sae import AuxK, Objective, total_variance
from sae.settings import TrainingSettings

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def step(tokens, num_latents, d_in=16, k=4):
    x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(0))
    sae = ARCHITECTURES[sys.argv[1]].init(d_in, num_latents, k, 0, x[:64])
    if sae.penalised:  # rare firings, but for a few tokens that fire for very many latents
        sae.b_enc -= 2.5
        x[::1000] *= 20
    dead = torch.arange(num_latents) % 8 == 0
    before = peak()
    objective = Objective(total_variance(x), tokens, AuxK(dead, d_in // 2, 1 / 32), precision=sys.argv[2])
    sae.loss_and_gradient(x, objective)
    settings = TrainingSettings(architecture=sys.argv[1], num_latents=num_latents, k=k, batch_tokens=tokens)
    need = training_need([Part(settings, 1, d_in, "layers.0")])
    return peak() - before, need.gradient + need.step + need.pieces

torch.set_num_threads(1)
step(64, 512)
print(*step(16384, 32768))
"""


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("topk", "float32"),
        pytest.param("topk", "bfloat16", marks=pytest.mark.slow),  # most of a minute where the product is emulated
        pytest.param("topk", "int8", marks=pytest.mark.slow),
        ("batchtopk", "float32"),
        *(
            pytest.param(kind, "float32", marks=pytest.mark.slow)
            for kind, architecture in ARCHITECTURES.items()
            if architecture.penalised
        ),
    ],
)
def test_a_step_stays_within_the_bound(architecture: str, precision: str) -> None:
    command = [sys.executable, "-c", _STEP, architecture, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    used, bound = map(int, done.stdout.split())
    assert used <= bound
    matrix = 16384 * 32768 * {"float32": 4, "bfloat16": 2, "int8": 4}[precision]
    assert bound < matrix / 4  # which would not have fitted by far
