"""Test that the policy is plain PyTorch, and that nothing slow comes along."""

from __future__ import annotations

import subprocess
import sys

PROBE = "import sys, getiaction.policy; print(*sorted(sys.modules))"


def test_the_policy_needs_no_framework() -> None:
    imported = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in imported
    assert not {"lerobot", "hydra", "omegaconf", "accelerate", "scipy", "matplotlib", "pandas"} & set(imported)
