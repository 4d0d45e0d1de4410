"""Start and end in half the time: what PyTorch and its like bring in is no garbage, so nobody has to look for some.

Importing makes a million objects that stay. Python's collector goes through them again and again meanwhile, which takes
40% of the time until a run starts, and once more when the process ends.
"""

from __future__ import annotations

import atexit
import gc


def hold_collector() -> None:
    """Collect no garbage until `release_collector`, and none of what is there at the very end. For commands only."""
    gc.disable()
    atexit.register(gc.freeze)


def release_collector() -> None:
    """Collect garbage again, but not among what is there already, if the collector was held."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
