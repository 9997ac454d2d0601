"""Row-wise operations as calls: allocate, launch, return."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.ops.linear.gpu import Codes, Rounding


def block_of(width: int) -> tuple[int, int]:
    """Numbers a program covers (a power of two) and its warps."""
    block = 1 << (width - 1).bit_length()
    return block, min(max(block // 512, 1), 16)


def _codes(rows: int, width: int, rounding: Rounding, dtype: torch.dtype | None, device: torch.device) -> Codes:
    x = torch.empty(rows, width, dtype=dtype or rounding.dtype, device=device)
    return Codes(x, rounding.scale if rounding.scale is not None else torch.empty(rows, device=device))


def rounded(x: Tensor, rounding: Rounding, dtype: torch.dtype | None = None) -> Codes:
    """Codes of x [T, K], stored in `dtype` (None: their own)."""
    from fewbit.ops.rows.triton_rows import round_rows

    rows, width = x.shape
    out = _codes(rows, width, rounding, dtype, x.device)
    block, warps = block_of(width)
    if rows:
        round_rows[(rows,)](
            x, out.x, out.scale, width, BLOCK=block, CODE=rounding.code, DYNAMIC=rounding.dynamic, PTX=x.is_cuda,
            num_warps=warps,
        )  # fmt: skip
    return out


def add_norm(
    x: Tensor | None,
    res: Tensor,
    weight: Tensor,
    eps: float,
    rounding: Rounding | None,
    dtype: torch.dtype | None = None,
) -> Tensor | Codes:
    """``res += x`` in place, then its RMSNorm: bfloat16 [T, K], or codes stored in `dtype` (None: their own)."""
    from fewbit.ops.rows.triton_rows import add_norm as kernel

    rows, width = res.shape
    out = torch.empty_like(res) if rounding is None else _codes(rows, width, rounding, dtype, res.device)
    block, warps = block_of(width)
    target, scale = (out.x, out.scale) if isinstance(out, Codes) else (out, res)
    kernel[(rows,)](
        res if x is None else x, res, weight, target, scale, width, eps, BLOCK=block, ADD=x is not None,
        CODE=rounding.code if rounding else "none", DYNAMIC=rounding is not None and rounding.dynamic,
        PTX=res.is_cuda, num_warps=warps,
    )  # fmt: skip
    return out


def gated(x: Tensor, rounding: Rounding | None, dtype: torch.dtype | None = None) -> Tensor | Codes:
    """``silu(gate) * up`` of x [T, 2 W], gate and up interleaved in blocks of 8: bfloat16 [T, W], or codes."""
    from fewbit.ops.rows.triton_rows import gated as kernel

    rows, width = x.shape[0], x.shape[1] // 2
    out = (
        torch.empty(rows, width, dtype=x.dtype, device=x.device)
        if rounding is None
        else _codes(rows, width, rounding, dtype, x.device)
    )
    block, warps = block_of(width)
    target, scale = (out.x, out.scale) if isinstance(out, Codes) else (out, x)
    kernel[(rows,)](
        x, target, scale, width, BLOCK=block, CODE=rounding.code if rounding else "none",
        DYNAMIC=rounding is not None and rounding.dynamic, PTX=x.is_cuda, num_warps=warps,
    )  # fmt: skip
    return out


def scaled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Int32 [T, N] times float32 rows [T] or [] and columns [N]: bfloat16."""
    from fewbit.ops.rows.triton_rows import scale_product

    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    t, n = x.shape
    scale_product[(-(-t // 16), -(-n // 256))](x, rows, columns, out, t, n, ROWS=rows.ndim == 1, num_warps=4)
    return out


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, head_dim: int,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """Normalize (if there are norms) and rotate q and k of qkv [T, (heads + 2 kv_heads) * head_dim] in place.

    cos, sin: float32 [T, head_dim / 2].
    """
    from fewbit.ops.attention.triton_store import rotate as kernel

    if len(qkv):
        both = (qkv if norm is None else norm for norm in (q_norm, k_norm))
        kernel[(len(qkv),)](
            qkv, *both, cos, sin, eps, qkv.stride(0), H=heads, HK=kv_heads, D=head_dim,
            HEADS=1 << (heads + kv_heads - 1).bit_length(), QK_NORM=q_norm is not None, num_warps=4,
        )  # fmt: skip
