"""From text to aligned latents."""

import os
import sys

if sys.platform == "win32":
    raise ImportError("this program runs on Linux and macOS; on Windows, run it in WSL (`wsl --install` sets that up)")

# The loops of ``sae.dictionaries.kernels.cpu`` run in threads of their own between PyTorch's products. OpenMP's
# threads would wait for the next product by turning round and round, for milliseconds, on the processors that those
# loops need: a step of training takes a third longer by it. Read when PyTorch is loaded; what the user has set stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
