"""Time the demo's stages on this machine, and print the constants for `autointerp/command_line/demo.py`.

    python benchmarks/demo_stages.py [--recipe RECIPE] [--threads 2]

Runs the demo's study from nothing in a temporary folder, with kernels that are not compiled yet, as in a fresh clone.
Prints the constants to paste over those of `autointerp/command_line/demo.py`, and how good the estimate of the total
time was during the run. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from sae.common.overview import Overview, Speed
    from sae.settings import Settings

MOMENTS = (3.0, 10.0, 30.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "eval_runs" / "recipes" / "demo.toml")
    parser.add_argument("--threads", type=int, help="CPU threads; default all")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = str(Path(folder, "compiled"))  # before anything imports numba
        measure(Path(folder, "runs"), asked.recipe, asked.threads)


def measure(root: Path, recipe: Path, threads: int | None) -> None:
    from autointerp.command_line import demo
    from sae.common.overview import Overview, Speed, measure_speed
    from sae.study.recipes import settings_from

    demo.RECIPE = recipe
    settings, speeds = settings_from(recipe), [measure_speed()]
    overview = Overview(demo.stages(settings, speeds[0]))
    estimates: list[tuple[float, float]] = []
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(0.5):
            estimates.append((overview.elapsed(), overview.elapsed() + overview.left()))

    threading.Thread(target=follow, daemon=True).start()
    demo.run_demo(root, threads, overview)
    whole = overview.elapsed()
    ended.set()
    speeds += [measure_speed() for _ in range(4)]
    show_constants(settings, overview, Speed(*(sorted(of)[2] for of in zip(*speeds, strict=True))), root, threads)
    for moment in (*MOMENTS, whole / 2):
        at, estimate = min(estimates, key=lambda pair: abs(pair[0] - moment))
        print(
            f"# after {at:.0f} s the estimate was {estimate:.0f} s; it took {whole:.0f} s ({estimate / whole - 1:+.0%})"
        )


def show_constants(settings: Settings, overview: Overview, speed: Speed, root: Path, threads: int | None) -> None:
    """Print the constants of `autointerp/command_line/demo.py` as they are on this machine."""
    from autointerp.command_line import demo
    from sae.study.probe import time_tokens
    from sae.study.run import study_runs
    from sae.study.stage import Compute

    corpus_tokens = study_runs(demo.STUDY, root)[0].record["corpus"]["n_tokens"]
    forward, step = sorted(time_tokens(settings, Compute("cpu", threads)) for _ in range(3))[1]
    print(f"REFERENCE_SPEED = Speed(python={speed.python:.3g}, matmul={speed.matmul:.3g})")
    print(f"CORPUS_TOKENS = {corpus_tokens:_}\nFORWARD_SECONDS = {forward:.3g}")
    print(f"STEP_SECONDS = {step / (settings.training.num_latents + demo.TOKEN_LATENTS):.3g}\nREFERENCE = {{")
    for stage, (name, of) in zip(overview.stages, demo.units(settings).items(), strict=True):
        start, work, end = stage.actual()
        work = max(0.0, work - forward * demo.forward_tokens(settings).get(name, 0))
        of *= step if name in (demo.TRAIN, demo.HARVEST) else 1
        word = next(word for word, value in vars(demo).items() if value == name)
        print(f"    {word}: Cost(start={start:.3g}, work={work / of:.3g}, end={end / of:.3g}),")
    print("}")


if __name__ == "__main__":
    main()
