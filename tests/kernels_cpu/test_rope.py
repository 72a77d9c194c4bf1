"""E9 of the rotary embedding, alone and after a norm of each head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from launcher_kernels import reference, rope
from tests.fused import DTYPES, assert_fused

EPS = 1e-6
NORMS = {
    "llama": {"offset": 0.0, "casting": "llama"},
    "gemma": {"offset": 1.0, "casting": "gemma"},
}


class Heads(NamedTuple):
    """Sizes of one call."""

    batch: int
    query_heads: int
    key_heads: int
    length: int
    head: int
    turned: int


SHAPES = {
    "grouped": Heads(2, 4, 2, 5, 16, 16),
    "one key head": Heads(1, 3, 1, 9, 8, 8),
    "partly turned": Heads(2, 2, 2, 3, 24, 10),
    "many heads": Heads(1, 11, 5, 2, 12, 12),
    "one number of two": Heads(1, 1, 1, 1, 2, 2),
}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(form: Heads, dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    """Cosine and sine of each token's own position, as transformers has them: each angle twice."""
    position = torch.randint(0, 5000, (batch, form.length, 1), generator=torch.Generator().manual_seed(3))
    steps = 10000.0 ** (-torch.arange(0, form.turned, 2) / form.turned)
    twice = torch.cat([position * steps, position * steps], -1)
    return [f(twice).to(dtype)[..., : form.turned // 2] for f in (torch.cos, torch.sin)]


def inputs(form: Heads, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Query and key as the projections leave them, [B, T, N, d]."""
    return [
        draw(form.batch, form.length, heads, form.head, dtype=dtype, seed=seed + i)
        for i, heads in enumerate((form.query_heads, form.key_heads))
    ]


def weights(form: Heads, dtype: torch.dtype) -> list[Tensor]:
    return [draw(form.head, dtype=dtype, seed=seed) for seed in (5, 6)]


def transposed(function: Callable[..., Sequence[Tensor]], **options: Any) -> Callable[..., Sequence[Tensor]]:
    """`function` of [B, T, N, d] seen as [B, N, T, d]."""
    return lambda query, key, *rest: function(query.transpose(1, 2), key.transpose(1, 2), *rest, **options)


def normed(module: Any, **options: Any) -> Callable[..., Sequence[Tensor]]:
    """`qk_norm_rope` of a module with its inputs in the order query, key, weights, angles."""
    return transposed(partial(module.qk_norm_rope, eps=EPS), **options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rope(shape: str, interleaved: bool, dtype: torch.dtype, launches: Counter[str]) -> None:
    form, before = SHAPES[shape], Counter(launches)
    given = [*inputs(form, dtype), *angles(form, dtype)]
    fused, eager = (transposed(module.rope, interleaved=interleaved) for module in (rope, reference))
    assert_fused(fused, eager, given, [0, 1])
    assert launches - before == {"rope_turn": 2}, "one launch forward and one backward"


@pytest.mark.parametrize("batch", [1, 2])
def test_angles_in_fp32_and_of_each_row(batch: int, launches: Counter[str]) -> None:
    form = SHAPES["grouped"]
    given = [*inputs(form, torch.bfloat16), *angles(form, torch.float32, batch)]
    assert_fused(transposed(rope.rope), transposed(reference.rope), given, [0, 1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", ["grouped", "one key head", "partly turned"])
def test_qk_norm_rope(shape: str, norm: str, dtype: torch.dtype, launches: Counter[str]) -> None:
    form, before = SHAPES[shape], Counter(launches)
    given = [*inputs(form, dtype), *weights(form, dtype), *angles(form, dtype)]
    fused, eager = (normed(module, **NORMS[norm]) for module in (rope, reference))
    assert_fused(fused, eager, given, range(4))
    assert launches - before == {"rope_turn": 1, "qk_norm_rope_backward": 1}


def test_qk_norm_rope_of_neighbours(launches: Counter[str]) -> None:
    form = SHAPES["partly turned"]
    given = [*inputs(form, torch.float16), *weights(form, torch.float16), *angles(form, torch.float16)]
    fused, eager = (normed(module, interleaved=True) for module in (rope, reference))
    assert_fused(fused, eager, given, range(4))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        lambda batch, groups, key_heads, length, half, turned: Heads(
            batch, groups * key_heads, key_heads, length, 2 * half, 2 * min(turned, half)
        ),
        *(st.integers(1, high) for high in (2, 4, 4, 7, 40, 40)),
    ),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 99),
)
def test_any_shape(
    launches: Counter[str], form: Heads, interleaved: bool, norm: bool, dtype: str, seed: int
) -> None:  # fmt: skip
    given = inputs(form, DTYPES[dtype], seed)
    found = []
    for module in (rope, reference):
        found.append((normed if norm else lambda m, **o: transposed(m.rope, **o))(module, interleaved=interleaved))
    given += [*(weights(form, DTYPES[dtype]) if norm else []), *angles(form, DTYPES[dtype])]
    assert_fused(*found, given, range(4 if norm else 2))


def test_it_turns_as_transformers_does(launches: Counter[str]) -> None:
    """Both layouts, against the models' own functions: the reference could have them wrong as well."""
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as of_neighbours
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as of_halves

    form = SHAPES["grouped"]
    query, key = (x.transpose(1, 2) for x in inputs(form, torch.float32))
    cos, sin = angles(form, torch.float32)
    for found, wanted in zip(
        rope.rope(query, key, cos, sin),
        of_halves(query, key, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
    found = rope.rope(query, key, cos, sin, interleaved=True)[0]
    torch.testing.assert_close(found, of_neighbours(query.transpose(1, 2), sin, cos).transpose(1, 2))


def test_tensors_are_read_where_they_lie(launches: Counter[str]) -> None:
    """Heads cut out of one projection of queries, keys and values, heads in any order of memory, angles with gaps."""
    form = Heads(2, 4, 2, 5, 16, 16)
    whole = draw(2, 5, 8 * 16, dtype=torch.float32)
    query, key, _ = (x.unflatten(-1, (-1, 16)) for x in whole.split([64, 32, 32], -1))
    wide = [x.repeat_interleave(2, -1)[..., ::2] for x in angles(form, torch.float32)]
    assert_fused(transposed(rope.rope), transposed(reference.rope), [query, key, *wide], [0, 1])
    query, key = draw(16, 4, 5, 2, dtype=torch.float32), draw(5, 16, 2, 2, dtype=torch.float32)
    given = [query.permute(3, 2, 1, 0), key.permute(2, 0, 3, 1), *wide]
    for interleaved in (False, True):
        fused, eager = (transposed(module.rope, interleaved=interleaved) for module in (rope, reference))
        assert_fused(fused, eager, given, [0, 1])


def test_the_result_lies_as_the_projections_do(launches: Counter[str]) -> None:
    form = SHAPES["grouped"]
    memory = [x.requires_grad_() for x in inputs(form, torch.float32)]
    turned = rope.rope(*(x.transpose(1, 2) for x in memory), *angles(form, torch.float32))
    for x, y in zip(memory, turned, strict=True):
        assert y.transpose(1, 2).is_contiguous()
        assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_without_strides(norm: bool, launches: Counter[str]) -> None:
    """That of a sum is one number seen many times."""
    form = SHAPES["grouped"]
    found = []
    for module in (rope, reference):
        given = [x.requires_grad_() for x in inputs(form, torch.float32)]
        given += weights(form, torch.float32) if norm else []
        turned = (normed(module) if norm else transposed(module.rope))(*given, *angles(form, torch.float32))
        (turned[0].sum() + turned[1].sum()).backward()
        found.append([x.grad for x in given[:2]])
    torch.testing.assert_close(found[0], found[1])


def test_one_key_head_is_turned(launches: Counter[str]) -> None:
    """Liger#342: where a copy was counted on, one head lay contiguous already and came out as it went in."""
    form = SHAPES["one key head"]
    key = inputs(form, torch.float32)[1].transpose(1, 2)
    assert key.is_contiguous()
    before = key.clone()
    turned = rope.rope(key, key, *angles(form, torch.float32))[1]
    assert torch.equal(key, before)
    assert (turned - before).abs().max() > 0.1


def test_what_comes_out_may_be_changed_in_place(launches: Counter[str]) -> None:
    form = SHAPES["grouped"]
    query, key = (x.transpose(1, 2).requires_grad_() for x in inputs(form, torch.float32))
    rope.rope(query, key, *angles(form, torch.float32))[0].mul_(2).sum().backward()
    once = torch.autograd.grad(rope.rope(query, key, *angles(form, torch.float32))[0].sum(), query)[0]
    torch.testing.assert_close(query.grad, 2 * once)


def test_the_normed_heads_are_rounded_as_eager_rounds_them(launches: Counter[str]) -> None:
    """Fewer roundings would pass for closer to the truth."""
    form = SHAPES["grouped"]
    given = [*inputs(form, torch.bfloat16), *weights(form, torch.bfloat16), *angles(form, torch.float32)]
    for found, eager in zip(normed(rope)(*given), normed(reference)(*given), strict=True):
        assert (found == eager).float().mean() > 0.995


def test_there_and_back(launches: Counter[str]) -> None:
    form = SHAPES["partly turned"]
    query, key = (x.transpose(1, 2) for x in inputs(form, torch.float32))
    cos, sin = angles(form, torch.float32)
    back = rope.rope(*rope.rope(query, key, cos, sin), cos, -sin)
    torch.testing.assert_close(back[0], query)
    assert torch.equal(back[1][..., form.turned :], key[..., form.turned :])


def test_no_tokens(launches: Counter[str]) -> None:
    form = Heads(1, 2, 1, 0, 8, 8)
    query, key = (x.transpose(1, 2).requires_grad_() for x in inputs(form, torch.float32))
    given = [x.requires_grad_() for x in weights(form, torch.float32)]
    turned = rope.qk_norm_rope(query, key, *given, *angles(form, torch.float32), EPS)
    torch.autograd.backward(turned, [torch.ones_like(x) for x in turned])
    assert turned[0].shape == query.shape
    assert torch.equal(given[0].grad, torch.zeros(8))
    rope.rope(*(torch.ones(1, 1, 1, 8) for _ in range(2)), torch.ones(1, 1, 4), torch.zeros(1, 1, 4))


def test_weight_gradients_of_many_tokens(launches: Counter[str]) -> None:
    """Several groups of tokens a program, and the same bits in every run."""
    form = Heads(1, 8, 2, 29, 128, 128)
    given = [*inputs(form, torch.bfloat16), *weights(form, torch.bfloat16), *angles(form, torch.bfloat16)]
    assert_fused(normed(rope), normed(reference), given, range(4))
    gradients = []
    for _ in range(2):
        trained = [x.requires_grad_() for x in weights(form, torch.bfloat16)]
        turned = normed(rope)(*given[:2], *trained, *given[4:])
        torch.autograd.backward(turned, [draw(*x.shape, dtype=x.dtype, seed=9) for x in turned])
        gradients.append([x.grad for x in trained])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.parametrize("trained", [(), (0,), (1,)])
def test_a_frozen_weight_gets_no_gradient(trained: tuple[int, ...], launches: Counter[str]) -> None:
    form = SHAPES["grouped"]
    heads = [x.transpose(1, 2).requires_grad_() for x in inputs(form, torch.float32)]
    given = [x.requires_grad_(i in trained) for i, x in enumerate(weights(form, torch.float32))]
    query, key = rope.qk_norm_rope(*heads, *given, *angles(form, torch.float32), EPS)
    (query.square().sum() + key.square().sum()).backward()
    assert all(x.grad is not None for x in heads)
    assert [x.grad is not None for x in given] == [i in trained for i in range(2)]


def test_what_does_not_fit_goes_through_pytorch(launches: Counter[str]) -> None:
    """Angles that are trained, and angles of too few tokens, which a kernel would read past the end of."""
    form, before = SHAPES["grouped"], Counter(launches)
    query, key = (x.transpose(1, 2) for x in inputs(form, torch.float32))
    cos, sin = (x.clone().requires_grad_() for x in angles(form, torch.float32))
    rope.rope(query, key, cos, sin)[0].sum().backward()
    assert cos.grad is not None
    with pytest.raises(RuntimeError):
        rope.rope(query, key, cos[:, :4], sin[:, :4])
    assert launches == before
    rope.rope(query, key, cos.detach(), sin.detach())


def test_torch_finds_the_ops_well_made(launches: Counter[str]) -> None:
    """Schema, fake and autograd registration, as torch.compile will rely on them."""
    form = SHAPES["grouped"]
    given = [x.transpose(1, 2).detach().requires_grad_() for x in inputs(form, torch.float32)]
    trained = [x.requires_grad_() for x in weights(form, torch.float32)]
    ops = torch.ops.launcher_kernels
    torch.library.opcheck(ops.rope.default, (*given, *angles(form, torch.float32), False, False))
    arguments = (*given, *trained, *angles(form, torch.float32), EPS, False, True, 0.0)
    torch.library.opcheck(ops.qk_norm_rope.default, arguments)


def test_compiled(launches: Counter[str]) -> None:
    form = SHAPES["grouped"]
    query, key = (x.transpose(1, 2) for x in inputs(form, torch.float32))
    given = (query, key, *angles(form, torch.float32))
    compiled = torch.compile(lambda *x: rope.rope(*x)[0] * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), rope.rope(*given)[0] * 2)


def test_without_a_gpu_it_is_pytorch() -> None:
    form = SHAPES["grouped"]
    given = [*(x.transpose(1, 2) for x in inputs(form, torch.bfloat16)), *angles(form, torch.bfloat16)]
    assert torch.equal(rope.rope(*given)[0], reference.rope(*given)[0])
