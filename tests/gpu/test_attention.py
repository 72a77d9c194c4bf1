"""Every implementation of attention over packed documents, as transformers calls it, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from launcher.model import attention

pytestmark = pytest.mark.gpu


@pytest.fixture(params=sorted(attention.NAMES))
def kind(request: pytest.FixtureRequest, device: torch.device) -> str:
    name: str = request.param
    if name == "flash":
        pytest.importorskip("flash_attn")
    return name


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("packing", ["1 x 8k", "8 x 1k", "4 x 2k"])
def test_e9(kind: str, packing: str, device: torch.device) -> None:
    from contest import OURS, Draw, Truth, check
    from timed_attention import PACKINGS, contests, registered

    contest = next(each for each in contests(dry=False) if each.name.startswith(packing))
    inputs = contest.inputs(Draw(device, torch.bfloat16))
    function = registered(kind, max(PACKINGS[packing]))
    verdict = check(contest, OURS, function, inputs, Truth(contest, inputs))
    assert verdict.state == "right", verdict.why


def test_documents_are_isolated(kind: str, device: torch.device) -> None:
    """E8: nothing of the other documents moves, to the bit, when one of them is another."""
    from contest import Draw
    from timed_attention import registered

    lengths, draw = [700, 1, 1300, 47], Draw(device, torch.bfloat16)
    borders = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    inputs = {name: draw.normal(sum(lengths), heads, 128).transpose(0, 1) for name, heads in
              (("query", 8), ("key", 2), ("value", 2))}  # fmt: skip
    function = registered(kind, max(lengths))
    before = function(**inputs, cu_seqlens=borders)
    for x in inputs.values():
        x[:, 701:2001] = draw.normal(x.shape[0], 1300, 128)
    after = function(**inputs, cu_seqlens=borders)
    assert torch.equal(before[:701], after[:701])
    assert torch.equal(before[2001:], after[2001:])
    assert not torch.equal(before[701:2001], after[701:2001])
