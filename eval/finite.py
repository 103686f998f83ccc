"""The one check of features that a caller hands to a protocol's functions."""

from jaxtyping import Float
from torch import Tensor

from contrastive.config import UserError

_LISTED = 5


def finite_float32(features: Float[Tensor, "n d"], name: str = "features") -> Float[Tensor, "n d"]:
    """``features`` in float32, in which all protocols compute.

    Args:
        features: Of any float dtype.
        name: What the error calls them.

    Raises:
        UserError: a row is not finite in float32.
    """
    rows = features.float()
    bad = (~rows.isfinite().all(1)).nonzero()[:, 0]
    if len(bad):
        listed = ", ".join(map(str, bad[:_LISTED].tolist())) + (", ..." if len(bad) > _LISTED else "")
        kind = str(features.dtype).removeprefix("torch.")
        raise UserError(
            f"{name}: {len(bad)} of {len(rows)} rows ({kind}) are not finite in float32: rows {listed}; "
            "leave them out with their labels, or compute them in float32"
        )
    return rows
