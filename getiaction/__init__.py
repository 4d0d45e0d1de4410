"""GetiAction: train Diffusion Policies, from one command."""

import os
from importlib.metadata import version

if "OMP_WAIT_POLICY" not in os.environ:  # before torch: threads that spin for others starve on a shared machine
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

__version__ = version("getiaction")
