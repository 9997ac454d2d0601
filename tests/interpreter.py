"""Triton's interpreter, for tests of kernels on a CPU. Import this before any kernel.

On a machine with a GPU the kernels are compiled instead and run there.
"""

from __future__ import annotations

import os

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _plain = interpreter._patch_lang_tensor

    def _patched(tensor, scope):
        """Triton 3.6 makes ints of arrays with one element, which numpy 2.4 and later refuses."""
        _plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patched
