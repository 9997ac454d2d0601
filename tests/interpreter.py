"""Triton's interpreter (conftest.py turns it on) made to work with today's numpy, for tests of kernels on a CPU.

On a machine with a GPU the kernels are compiled instead and run there.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform: its kernels are not tested here")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    from triton.runtime import interpreter

    _plain = interpreter._patch_lang_tensor

    def _patched(tensor, scope):
        """Triton 3.6 makes ints of arrays with one element, which numpy 2.4 and later refuses."""
        _plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patched
