"""What network kernels ask of a tensor before they read its memory: one place, one message."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.errors import EngineError


def check_tensor(
    tensor: Tensor,
    operation: str,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise EngineError, naming operation and argument, unless the tensor is of this dtype and
    shape, contiguous and in main memory."""
    is_right = tensor.dtype == dtype and tuple(tensor.shape) == shape
    if not (is_right and tensor.is_contiguous() and tensor.is_cpu):
        before, after = ("", "") if tensor.is_contiguous() else ("strided ", ", not contiguous")
        raise EngineError(
            f"{operation}: {name} must be contiguous {dtype} {list(shape)} in main memory, found "
            f"{before}{tensor.dtype} {list(tensor.shape)}{after}, on {tensor.device}"
        )
