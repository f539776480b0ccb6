"""Linear layers on the CPU with weights packed once for oneDNN, as Inductor's freezing does.

`F.linear` lays a weight out anew on every call: with 1 to 16 rows it reads bfloat16 at 15 to 25 GB/s where the packed
form reads at 40 to 60. The operators are not public API, so their result is compared before they are used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedWeight:
    """Holds one weight [out, in] in oneDNN's own order; the slow twin is `F.linear` on the plain one."""

    def __init__(self, weight: Tensor) -> None:
        with torch.inference_mode():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __call__(self, x: Tensor, linear: nn.Module) -> Tensor:
        """x [..., in] -> [..., out]; the layer itself is not read."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def packed_works(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN multiplies packed weights of `dtype`, and gives `F.linear`'s result."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    linear = nn.Linear(64, 48)
    try:
        with torch.inference_mode():
            packed = PackedWeight(weight)
            for rows in (1, 5, 33):
                x = torch.randn(rows, 64, generator=generator).to(dtype)
                close = 1e-4 if dtype == torch.float32 else 0.1
                if not torch.allclose(packed(x, linear), F.linear(x, weight), atol=close, rtol=close):
                    return False
    except (RuntimeError, AttributeError):
        return False
    return True
