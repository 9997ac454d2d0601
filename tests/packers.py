"""AutoAWQ's and GPTQ's layouts by their definition, in plain Python: what our readers are held to.

Uses nothing of fewbit. A quantized weight here is whole numbers `q` [out, in] and `z` [out, groups], unsigned, scales
`s` float16 [out, groups] and the group of each column; W = (q - z) * s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble k, lowest first, of a word holds this one of eight output columns


@dataclass
class Whole:
    """A quantized weight before any packing."""

    bits: int
    q: np.ndarray
    z: np.ndarray
    s: np.ndarray
    group_of: np.ndarray

    @property
    def dense(self) -> np.ndarray:
        """float32 [out, in]"""
        zero, scale = self.z[:, self.group_of], self.s[:, self.group_of].astype(np.float32)
        return (self.q - zero).astype(np.float32) * scale


def draw(out: int, columns: int, bits: int, group: int, sym: bool, order: bool, seed: int) -> Whole:
    """Random whole numbers; `order`: columns in a random order of groups."""
    rng = np.random.default_rng(seed)
    group = columns if group == -1 else group
    groups = columns // group
    z = np.full((out, groups), 1 << (bits - 1)) if sym else rng.integers(0, 1 << bits, (out, groups))
    s = ((0.5 + rng.random((out, groups))) / (1 << bits) / columns**0.5 * 4).astype(np.float16)
    group_of = np.arange(columns) // group
    return Whole(
        bits, rng.integers(0, 1 << bits, (out, columns)), z, s, rng.permutation(group_of) if order else group_of
    )


def stream(codes: list[int], bits: int) -> list[int]:
    """Codes one after the other, each lowest bit first, cut into signed 32-bit words."""
    joined = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    words = [(joined >> (32 * n)) & 0xFFFFFFFF for n in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def gptq(w: Whole, v2: bool = False) -> dict[str, np.ndarray]:
    """qweight along *in*, qzeros along *out* (v1: one less, which wraps below 0), scales, g_idx."""
    z = w.z if v2 else (w.z - 1) % (1 << w.bits)
    return {
        "qweight": np.array([stream(row, w.bits) for row in w.q], np.int32).T.copy(),
        "qzeros": np.array([stream(column, w.bits) for column in z.T], np.int32),
        "scales": w.s.T.copy(),
        "g_idx": w.group_of.astype(np.int32),
    }


def awq(w: Whole) -> dict[str, np.ndarray]:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]; eight outputs to a word, interleaved."""

    def words(unsigned: np.ndarray) -> np.ndarray:
        rows = [[row[8 * n + k] for n in range(len(row) // 8) for k in AWQ_ORDER] for row in unsigned]
        return np.array([stream(row, 4) for row in rows], np.int32)

    return {"qweight": words(w.q.T), "qzeros": words(w.z.T), "scales": w.s.T.copy()}
