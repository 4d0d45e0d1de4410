"""The host does not run away from the device."""

from __future__ import annotations

import pytest
import torch

from getiaction.training.lead import STEPS, Lead


def test_nobody_is_ahead_of_a_cpu() -> None:
    lead = Lead(torch.device("cpu"))
    for _ in range(2 * STEPS):
        lead.keep()
    assert not lead._ends


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU does one thing after the other")
def test_the_host_waits_for_the_step_before_the_last_few() -> None:
    lead, ends = Lead(torch.device("cuda")), []
    for number in range(3 * STEPS):
        torch.cuda._sleep(10**7)
        ends.append(torch.cuda.current_stream().record_event())
        lead.keep()
        assert all(end.query() for end in ends[: number - STEPS + 1])
    assert not ends[-1].query()
