"""Weights with most elements zero, as compressed-tensors once stored them: read as if they were dense.

``sparse-24-bitmask`` (two of four elements) and ``sparse-bitmask`` put in the place of ``P.weight`` [out, in]

    P.shape       int64, its two sizes
    P.compressed  the elements that are not zero, row by row
    P.bitmask     uint8 [out, ceil(in / 8)], a bit an element, the lowest first: whether it is there
    P.row_offsets int64, where each row starts in ``compressed``; only in the second, and not needed

The library dropped both with its release 0.13, and no current engine loads them, so fewbit does not write them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.checkpoint.files import CPU, Files, View
from fewbit.checkpoint.layout import Stored
from fewbit.errors import CheckpointError, UnsupportedError

FORMATS = ("sparse-24-bitmask", "sparse-bitmask")
PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def without_bitmasks(files: Files) -> Files:
    """The same model with dense weights, if it has any that are not.

    Raises:
        UnsupportedError: another sparse storage.
    """
    quantization = files.config.get("quantization_config")
    sparsity = quantization.get("sparsity_config") if isinstance(quantization, dict) else None
    stored = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    if stored == "dense":
        return files
    if stored not in FORMATS:
        raise UnsupportedError(
            f"compressed-tensors: sparse storage '{stored}' is not read; known: {', '.join(FORMATS)}"
        )
    return Unmasked(files)


class Unmasked(View):
    """A directory whose sparse weights show themselves as dense ones.

    Raises:
        CheckpointError: parts of a weight are missing, or do not fit each other.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._masked = {n.removesuffix(".bitmask") for n in files.entries if n.endswith(".bitmask")}
        parts = {f"{module}.{part}" for module in self._masked for part in PARTS}
        self.entries = {name: stored for name, stored in files.entries.items() if name not in parts}
        for module in self._masked:
            self.entries[f"{module}.weight"] = self._dense(module)

    def _dense(self, module: str) -> Stored:
        """What a masked weight will be: its rows are the mask's; the true width is read with it."""
        for part in PARTS[:3]:
            if f"{module}.{part}" not in self._files.entries:
                raise CheckpointError(f"tensor '{module}.{part}' is missing, though there is '{module}.bitmask'")
        shape = self._files.read(f"{module}.shape").flatten().tolist()
        mask = self._files.entries[f"{module}.bitmask"]
        if mask.dtype != torch.uint8 or len(shape) != 2 or mask.shape != (shape[0], -(-shape[1] // 8)):
            raise CheckpointError(f"tensor '{module}.bitmask' {list(mask.shape)} does not fit a weight {shape}")
        return Stored(self._files.entries[f"{module}.compressed"].dtype, tuple(shape))

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """See `Files.read`."""
        module = name.removesuffix(".weight")
        if name == module or module not in self._masked:
            return self._files.read(name, device)
        stored = self.entries[name]
        packed = self._files.read(f"{module}.bitmask", device)
        values = self._files.read(f"{module}.compressed", device).flatten()
        bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
        mask = bits.flatten(-2)[:, : stored.shape[1]].bool()
        if (count := int(mask.sum())) != len(values):
            raise CheckpointError(
                f"'{module}.bitmask' marks {count} elements, '{module}.compressed' holds {len(values)}"
            )
        # as raw integers: not every dtype can be placed by a mask
        raw = torch.uint8 if stored.dtype.itemsize == 1 else torch.int16 if stored.dtype.itemsize == 2 else torch.int32
        dense = torch.zeros(stored.shape, dtype=raw, device=device)
        dense[mask] = values.view(raw)
        return dense.view(stored.dtype)
