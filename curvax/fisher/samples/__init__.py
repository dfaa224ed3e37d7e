"""Products with the rows of $G$, one or several an example: stored, or computed as they are needed.

All is in real coordinates: a complex parameter is two of them, and a complex output two outputs.
"""

from curvax.fisher.samples._coordinates import Coordinates
from curvax.fisher.samples._jacobian import JacobianRows
from curvax.fisher.samples._mesh import has_mesh, on_every_device, share_of
from curvax.fisher.samples._micro_batches import MicroBatchedRows, in_micro_batches
from curvax.fisher.samples._stored import Rows, StoredRows, stored_rows

__all__ = [
    "Coordinates",
    "JacobianRows",
    "MicroBatchedRows",
    "Rows",
    "StoredRows",
    "has_mesh",
    "in_micro_batches",
    "on_every_device",
    "share_of",
    "stored_rows",
]
