"""Check that features given to a protocol's functions are finite."""

from jaxtyping import Float
from torch import Tensor

from contrastive.config import UserError

_LISTED = 5


def finite_float32(features: Float[Tensor, "n d"], name: str = "features") -> Float[Tensor, "n d"]:
    """Return ``features`` in float32, the precision of all protocols.

    Args:
        features: Features of any float dtype.
        name: Their name in the error.

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
