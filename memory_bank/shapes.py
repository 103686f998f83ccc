"""Shape annotations: jaxtyping's where it is installed (tests), plain tensors where it is not (training)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:

        class _Plain:
            """``Float[Tensor, "b d"]`` reads as ``Tensor``."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = UInt8 = _Plain

__all__ = ["Bool", "Float", "Int", "UInt8"]
