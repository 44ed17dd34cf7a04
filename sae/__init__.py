"""From text to aligned latents."""

import os
import sys

if sys.platform == "win32":
    raise ImportError("this program runs on Linux and macOS; on Windows, run it in WSL (`wsl --install` sets that up)")

if not os.environ.get("NUMBA_NUM_THREADS", "1").strip("0").isdecimal():
    raise ImportError("NUMBA_NUM_THREADS must be a whole number from 1; correct it or unset it")

# OpenMP threads would wait in a busy loop for PyTorch's next product, on the processors that the threads of
# ``sae.dictionaries.kernels.cpu`` need: a training step would take a third longer. PyTorch reads this when loaded;
# a value that the user has set is kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
