"""Keys and FLOPs against the mask itself; the record's numbers are in test_sweep.py."""

import pytest
import torch

from speedrun_mup.core.model import GPTConfig
from speedrun_mup.core.model.attention import may_attend
from speedrun_mup.training.flops import attention_flops, keys_seen, weight_flops


@pytest.mark.parametrize("window", [0, 1, 2, 5, 99])
@pytest.mark.parametrize("opens", [(), (0,), (3, 4, 20), tuple(range(48))])
def test_keys_seen_are_those_that_the_mask_allows(window, opens):
    doc = torch.tensor([t in opens for t in range(48)]).cumsum(0)
    t = torch.arange(48)
    allowed = may_attend(t[:, None], t, doc[:, None], doc, window, 8)
    assert keys_seen(doc, window, 8) == pytest.approx(allowed.sum().item() / 48)


def test_the_record_by_its_specification():
    """6 N = 727.3 MF; 51.7 MF of attention at 865 and 377 keys, 30.7 with the document mask at 426 and 256."""
    shape = GPTConfig()
    assert weight_flops(shape) == 6 * 121_208_832
    assert attention_flops(shape, 865, 377) == pytest.approx(51.7e6, rel=1e-3)
    assert attention_flops(shape, 426, 256) == pytest.approx(30.7e6, rel=2e-3)
