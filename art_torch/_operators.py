"""What the operators' wrappers share: calls, argument errors, fake and autograd kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from art_torch import _C  # noqa: F401  (loading it registers torch.ops.art)


def call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls an operator; its argument errors become Python's."""
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    try:
        # Inputs that require grad were refused above; this skips the check for direct callers of
        # torch.ops.art, which costs more than the rest of the call.
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)
    except RuntimeError as error:
        _raise_argument_error(error)


def _raise_argument_error(error: RuntimeError) -> NoReturn:
    """C++ knows one exception; its checks of arguments start with the operator's name."""
    message = str(error).splitlines()[0] if str(error) else ""
    for name in ("decode_attention: ", "append_kv: ", "encode_keys: ", "guided_walk: "):
        if message.startswith(name):
            kind = TypeError if message.startswith(name + "dtype of") else ValueError
            raise kind(message) from None
    raise error


def check_tensors(op: str, names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> None:
    """Refuses what is no tensor, or wants a gradient."""
    needs_grad = False
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        needs_grad = needs_grad or tensor.requires_grad
    if needs_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: inputs must not require grad, for the operator has no backward; "
            "use torch.no_grad() or detach()"
        )


def as_float32(tensor: Tensor | None) -> Tensor | None:
    """The form in which operators take numbers per head."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def window_argument(op: str, sliding_window: int | None) -> int:
    """The operators' form of a window: 0 for none."""
    if sliding_window is None:
        return 0
    if sliding_window < 1:
        raise ValueError(f"{op}: sliding_window must be positive or None, got {sliding_window}")
    return sliding_window


def check_one_device(op: str, names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> None:
    """Meta tensors beside real ones end up here, and would give results without data."""
    device = tensors[0].device
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.device != device:
            raise RuntimeError(
                f"{op}: {name} must be on the device of {names[0]}, {device}, got {tensor.device}"
            )


def _refusing_grad(op: Any) -> Any:
    """Autograd kernel of an operator without a backward: refuses instead of losing gradients."""

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())
        ):
            raise RuntimeError(
                f"{op.name()} has no backward: its inputs must not require grad under grad mode"
            )
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return kernel


# register_autograd() does not take operators with keyword-only tensors.
_AUTOGRAD = torch.library.Library("art", "IMPL")


def register(fakes: Mapping[Any, Any]) -> None:
    """Gives operators their fake kernels, and autograd kernels that refuse."""
    for op, fake in fakes.items():
        torch.library.register_fake(op.name(), fake)
        _AUTOGRAD.impl(op.name(), _refusing_grad(op), "Autograd", with_keyset=True)
