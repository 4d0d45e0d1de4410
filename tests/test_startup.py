"""The collector is held while a command starts, and only then."""

from __future__ import annotations

import subprocess
import sys

COMMAND = """
import gc, sys
sys.argv = ["getiaction", "check", "+preset=pusht_laptop"]
from getiaction.cli import main
from getiaction.startup import release_collector
assert gc.isenabled()
main()
assert not gc.isenabled()  # nobody has released it
release_collector()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
frozen = gc.get_freeze_count()
release_collector()  # a sweep comes by for each of its runs: what is garbage by then must not stay
assert gc.get_freeze_count() == frozen
"""


def test_the_collector_is_held_until_all_is_there() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all is well" in done.stdout
