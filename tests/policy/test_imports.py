"""Test that the policy is plain PyTorch."""

from __future__ import annotations

import subprocess
import sys

PROBE = "import sys, getiaction.policy; print(*sorted({name.split('.')[0] for name in sys.modules}))"


def test_the_policy_needs_no_framework() -> None:
    imported = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in imported
    assert not {"lerobot", "hydra", "omegaconf", "accelerate"} & set(imported)
