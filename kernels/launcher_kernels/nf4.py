"""bitsandbytes' 4-bit weights back to 16 or 32 bits, in one launch.

    w[i] = code[q[i]] * absmax[i / block_size]
    absmax[j] = absmax_code[a[j]] * absmax_scale[j / absmax_block_size] + absmax_offset      (double quantization)

NF4 and double quantization: Dettmers et al., 2023. q is packed two to a byte, the earlier in the upper half. Of an
[N, K] weight in a 16-bit dtype, blocks of 64 and 256, the bytes are NK (1/2 + 1/64 + 1/4096 + 2) = 2.516 NK;
bitsandbytes needs three launches and 2.7 NK, for it writes absmax in fp32 and reads it again, twice.

The same bits as bitsandbytes gives: products and sum in fp32, each rounded on its own (its CUDA code for sm_90 has one
FMUL for absmax and leaves the sum to PyTorch; hence no contraction into an FMA here, which TRITON_DEFAULT_FP_FUSION
would allow), then rounded to the dtype once. Its CUDA code flushes products under 1.2e-38 to zero; its CPU code does
not, nor does this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from launcher_kernels import reference
from launcher_kernels.dispatch import launch, runs_triton

_VALUES = 8192
"""Of a program: 64 a thread, whose fixed work is then an eighth of its instructions."""


@triton.jit
def nf4_dequantize(
    packed_ptr, code_ptr, absmax_ptr, absmax_code_ptr, absmax_scale_ptr, absmax_offset_ptr, w_ptr, count, num_bytes,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr, ABSMAX_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of BLOCK values a program."""
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    start = first_block * BLOCK
    inner = tl.arange(0, BLOCKS)
    block = first_block + inner
    known = block * BLOCK < count
    if DOUBLE:
        place = tl.load(absmax_ptr + block, mask=known, other=0).to(tl.int32)
        absmax = tl.load(absmax_code_ptr + place) * tl.load(absmax_scale_ptr + block // ABSMAX_BLOCK, mask=known)
        absmax += tl.load(absmax_offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=known, other=0.0)
    half: tl.constexpr = BLOCK // 2
    byte = inner[:, None] * half + tl.arange(0, half)[None, :]
    pair = tl.load(packed_ptr + start // 2 + byte, mask=byte < num_bytes - start // 2, other=0).to(tl.int32)
    # From shared memory: 16 neighbouring words, so no bank is asked for two. From L1 or by choosing among registers it
    # takes 1.3 and 2 times as many instructions, and they would take longer than the bytes.
    code = tl.load(code_ptr + tl.arange(0, 16))
    upper = tl.gather(code, tl.reshape(pair >> 4, (BLOCKS * half,)), 0)
    lower = tl.gather(code, tl.reshape(pair & 15, (BLOCKS * half,)), 0)
    upper = (tl.reshape(upper, (BLOCKS, half)) * absmax[:, None]).to(w_ptr.dtype.element_ty)
    lower = (tl.reshape(lower, (BLOCKS, half)) * absmax[:, None]).to(w_ptr.dtype.element_ty)
    place = inner[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(w_ptr + start + place, tl.interleave(upper, lower), mask=place < count - start)


def dequantize_nf4(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    block_size: int = 64,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_block_size: int = 256,
) -> Tensor:
    """The weight of `shape` in `dtype` (fp32, bf16 or fp16).

    `packed` are the bytes, as a tensor of any dtype; `code` [16] fp32; `absmax`, one for each `block_size` numbers of
    the flattened weight (a power of two): fp32, or uint8 into `absmax_code` [256] fp32 together with `absmax_scale`,
    one for each `absmax_block_size` of them, and `absmax_offset` [], both fp32. Not differentiable.
    """
    if not runs_triton(packed):
        return reference.dequantize_nf4(
            packed, code, absmax, shape, dtype, block_size=block_size, absmax_code=absmax_code,
            absmax_scale=absmax_scale, absmax_offset=absmax_offset, absmax_block_size=absmax_block_size,
        )  # fmt: skip
    whole: Tensor = _dequantize(
        packed, code, absmax, list(shape), dtype, block_size, absmax_code, absmax_scale, absmax_offset,
        absmax_block_size,
    )  # fmt: skip
    return whole


@torch.library.custom_op("launcher_kernels::dequantize_nf4", mutates_args=())
def _dequantize(
    packed: Tensor, code: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype, block_size: int,
    absmax_code: Tensor | None, absmax_scale: Tensor | None, absmax_offset: Tensor | None, absmax_block_size: int,
) -> Tensor:  # fmt: skip
    w = torch.empty(shape, dtype=dtype, device=packed.device)
    pairs = packed.reshape(-1).view(torch.uint8)
    double = absmax_code is not None
    blocks = max(1, _VALUES // block_size)
    launch(
        nf4_dequantize, (triton.cdiv(w.numel(), blocks * block_size),),
        pairs, code, absmax, absmax_code if double else code,
        absmax_scale if double else code, absmax_offset if double else code, w, w.numel(), pairs.numel(),
        DOUBLE=double, BLOCK=block_size, ABSMAX_BLOCK=absmax_block_size, BLOCKS=blocks,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return w


@_dequantize.register_fake
def _(packed, code, absmax, shape, dtype, *_):
    return packed.new_empty(shape, dtype=dtype)
