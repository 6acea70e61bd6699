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


def check_rows(tensor: Tensor, operation: str, name: str, shape: tuple[int, ...]) -> None:
    """Raise EngineError, naming operation and argument, unless the tensor is float32 of this shape,
    [T, H] or [T, heads, H], in main memory, with contiguous rows; rows may lie apart."""
    is_right = tensor.dtype == torch.float32 and tuple(tensor.shape) == shape
    is_dense = tensor.ndim > 0 and (tensor.shape[-1] <= 1 or tensor.stride(-1) == 1)
    if not (is_right and is_dense and tensor.ndim <= 3 and tensor.is_cpu):
        raise EngineError(
            f"{operation}: {name} must be float32 {list(shape)} in main memory with contiguous "
            f"rows, found {tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}, on "
            f"{tensor.device}"
        )
