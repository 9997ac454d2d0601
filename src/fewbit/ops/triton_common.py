"""What the Triton kernels share: dependent launches, rounding, and 4-bit decoding.

Inline PTX and ``gdc_wait`` do not run under Triton's interpreter, and neither does arithmetic on bfloat16. So each
helper takes ``PTX: tl.constexpr``; False selects plain operations that compute the same numbers in float32.

Dependent launches (PDL): a kernel launched with ``launch_pdl=True`` may start while the one before it still runs. It
must call `wait_previous` before it reads or writes what any kernel of the same graph writes; weights, page tables and
lengths may be read before. All blocks of every such kernel wait, so a kernel that is done implies that all before it
are done. ``PDL: tl.constexpr`` is 0 (an ordinary launch), 1 (the next kernel may start at once: several can stand in
line with their weights under way) or 2 (when this one has stopped waiting).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start_next(PDL: tl.constexpr):
    """Allow the next kernel of the stream to start."""
    if PDL == 1:
        gdc_launch_dependents()


@triton.jit
def wait_previous(PDL: tl.constexpr):
    """Wait until the kernel before this one is complete and its writes are visible."""
    if PDL > 0:
        gdc_wait()
        if PDL == 2:
            gdc_launch_dependents()


@triton.jit
def prefetch_line(p, PTX: tl.constexpr):
    """Bring the 128-byte lines at these addresses to L2."""
    if PTX:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def prefetch_block(p, n, PTX: tl.constexpr):
    """Bring the `n` bytes (a multiple of 16) at the scalar address `p` to L2: one request, made by the first thread."""
    if PTX:
        tl.inline_asm_elementwise(
            """{ .reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 q, t, 0;
            @q cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }""",
            "=r,l,r",
            [p, n],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch_ahead(p, pieces, program, programs, PTX: tl.constexpr):
    """The share of one of several programs in bringing `pieces` of 8 KiB at `p` (uint8) to L2."""
    for i in tl.range(program, pieces, programs):
        prefetch_block(p + i * 8192, 8192, PTX)


@triton.jit
def nearest_int(x):
    """The nearest whole number, ties to even, for magnitudes below 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_e4m3(x, PTX: tl.constexpr):
    """float32 to the nearest E4M3 number, ties to even, saturating; float32."""
    if PTX:
        return x.to(tl.float8e4nv).to(tl.float32)  # the instruction saturates
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576  # 3 bits of mantissa
    small = (x + 24576.0) - 24576.0  # subnormals are multiples of 2**-9
    return tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))


@triton.jit
def e4m3_bits(x):
    """The code of a float32 that is an E4M3 number, int8; by integers alone."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits >> 20) & 0x7FF) - (120 << 3)  # exponent and mantissa, the bias of 127 made 7
    code = tl.where(tl.abs(x) < 0.015625, (tl.abs(x) * 512.0).to(tl.int32), normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def _round_e2m1(x):
    """float32 to the nearest E2M1 number, ties to even, saturating."""
    a = tl.minimum(tl.abs(x), 6.0)
    a = tl.where(a < 2, nearest_int(a * 2) * 0.5, tl.where(a < 4, nearest_int(a), nearest_int(a * 0.5) * 2))
    return tl.where(x < 0, -a, a)


@triton.jit
def _round_blocks(x, CODE: tl.constexpr, PTX: tl.constexpr):
    """float32 [n] in units of the outer scale to E2M1 numbers times the scale of their block, which bfloat16 holds.

    ``nvfp4``: blocks of 16, E4M3 scales; ``mxfp4``: of 32, powers of two; `fewbit.numerics.reference.choose_scale` has
    the rules.
    """
    SIZE: tl.constexpr = 16 if CODE == "nvfp4" else 32
    blocks = tl.reshape(x, (x.shape[0] // SIZE, SIZE))
    amax = tl.max(tl.abs(blocks), 1)
    if CODE == "nvfp4":
        scale = tl.where(amax > 0, round_e4m3(tl.maximum(tl.div_rn(amax, 6.0), 0.001953125), PTX), 1.0)
    else:
        bits = amax.to(tl.int32, bitcast=True) + 0x200000  # mantissas from 1.75 on reach the next power
        power = tl.minimum(tl.maximum((bits >> 23) - 2, 1), 254)  # 4 is the largest power of E2M1
        scale = tl.where(amax > 0, (power << 23).to(tl.float32, bitcast=True), 1.0)
    return tl.reshape(_round_e2m1(tl.div_rn(blocks, scale[:, None])) * scale[:, None], (x.shape[0],))


@triton.jit
def round_code(x, CODE: tl.constexpr, PTX: tl.constexpr):
    """float32 in units of its scale to the nearest number that `CODE` can say.

    ``e4m3`` and ``int8`` are element sets; ``nvfp4`` and ``mxfp4`` are blocks along x [n], see `_round_blocks`.
    """
    if CODE == "nvfp4" or CODE == "mxfp4":
        return _round_blocks(x, CODE, PTX)
    if CODE == "e4m3":
        return round_e4m3(x, PTX)
    return tl.minimum(tl.maximum(nearest_int(x), -128.0), 127.0)


@triton.jit
def top_of(CODE: tl.constexpr):
    """What a largest magnitude is divided by for its scale; see `fewbit.numerics.reference.amax_scale`."""
    top: tl.constexpr = 448.0 if CODE == "e4m3" else 127.5
    return top


@triton.jit
def int4_planes(w, offset, PTX: tl.constexpr):
    """Int16 words of four nibbles u to four planes of ``u + 128 + offset``, `offset` the negative of 128 + zero.

    One LOP3 puts a nibble into the mantissa of 128.0, one packed FMA adds the offset: 1.6 operations a weight.
    """
    if PTX:
        planes = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, m, c, e; mov.b32 m, 0x000F000F; mov.b32 c, 0x43004300; mov.b32 e, 0x3F803F80;
            lop3.b32 $0, $4, m, c, 0xEA;  fma.rn.bf16x2 $0, $0, e, $5;
            shr.u32 t, $4, 4;  lop3.b32 $1, t, m, c, 0xEA;  fma.rn.bf16x2 $1, $1, e, $5;
            shr.u32 t, $4, 8;  lop3.b32 $2, t, m, c, 0xEA;  fma.rn.bf16x2 $2, $2, e, $5;
            shr.u32 t, $4, 12; lop3.b32 $3, t, m, c, 0xEA;  fma.rn.bf16x2 $3, $3, e, $5; }""",
            "=&r,=&r,=&r,=&r,r,r",
            [w, offset],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        v = w.to(tl.int32)
        o = offset.to(tl.float32) + 128.0
        planes = (
            (v & 15).to(tl.float32) + o,
            ((v >> 4) & 15).to(tl.float32) + o,
            ((v >> 8) & 15).to(tl.float32) + o,
            ((v >> 12) & 15).to(tl.float32) + o,
        )
    return planes


@triton.jit
def _e2m1(v):
    m = (v & 7).to(tl.float32)
    a = tl.where(m < 4, m * 0.5, tl.where(m < 6, m - 2, m * 2 - 8))
    return tl.where((v & 8) > 0, -a, a)


@triton.jit
def e2m1_planes(w, s0, s1, s2, s3, PTX: tl.constexpr):
    """Int16 words of four E2M1 codes and a scale for each to four planes of value * 2**-126 * scale.

    Sign to bit 15, magnitude to bits 8..6: read as bfloat16 this is the value times 2**-126, exactly.
    """
    if PTX:
        planes = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, m, g, z; mov.b32 m, 0x01C001C0; mov.b32 g, 0x80008000; mov.b32 z, 0x80008000;
            shl.b32 t, $4, 6; and.b32 t, t, m; shl.b32 u, $4, 12; lop3.b32 t, u, g, t, 0xEA; fma.rn.bf16x2 $0, t, $5, z;
            shl.b32 t, $4, 2; and.b32 t, t, m; shl.b32 u, $4, 8;  lop3.b32 t, u, g, t, 0xEA; fma.rn.bf16x2 $1, t, $6, z;
            shr.u32 t, $4, 2; and.b32 t, t, m; shl.b32 u, $4, 4;  lop3.b32 t, u, g, t, 0xEA; fma.rn.bf16x2 $2, t, $7, z;
            shr.u32 t, $4, 6; and.b32 t, t, m; lop3.b32 t, $4, g, t, 0xEA; fma.rn.bf16x2 $3, t, $8, z; }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [w, s0, s1, s2, s3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        v = w.to(tl.int32)
        small: tl.constexpr = 2.0**-126
        planes = (
            _e2m1(v) * small * s0.to(tl.float32),
            _e2m1(v >> 4) * small * s1.to(tl.float32),
            _e2m1(v >> 8) * small * s2.to(tl.float32),
            _e2m1(v >> 12) * small * s3.to(tl.float32),
        )
    return planes


@triton.jit
def nibble4(w, PTX: tl.constexpr):
    """The nibble at bits 16-19 as float32 128 + u. One LOP3: written as ``(w & a) | b`` ptxas needs two."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m, c; mov.b32 m, 0x000F0000; mov.b32 c, 0x43000000; lop3.b32 $0, $1, m, c, 0xEA; }",
            "=r,r",
            [w],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return ((w & 0xF0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def nibble3(w, PTX: tl.constexpr):
    """The nibble at bits 12-15 as float32 2048 + u."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m, c; mov.b32 m, 0x0000F000; mov.b32 c, 0x45000000; lop3.b32 $0, $1, m, c, 0xEA; }",
            "=r,r",
            [w],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return ((w & 0xF000) | 0x45000000).to(tl.float32, bitcast=True)


@triton.jit
def dot4(a, b, c, PTX: tl.constexpr):
    """The product of the four int8 in a and those in b, added to c, int32."""
    if PTX:
        r = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        r = c + (a << 24 >> 24) * (b << 24 >> 24) + (a << 16 >> 24) * (b << 16 >> 24)
        r += (a << 8 >> 24) * (b << 8 >> 24) + (a >> 24) * (b >> 24)
    return r


@triton.jit
def low_bf16(v):
    """The bfloat16 in the low half of an int32, as float32."""
    return (v << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_bf16(v):
    """The bfloat16 in the high half of an int32, as float32."""
    return (v & -65536).to(tl.float32, bitcast=True)
