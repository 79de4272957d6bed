"""NumPy arrays over regions. Needs NumPy: `pip install userfault[numpy]`."""

from __future__ import annotations

try:
    import numpy as np  # noqa: F401  # its absence is explained here, once
except ImportError as error:
    raise ImportError("userfault's arrays need NumPy: pip install 'userfault[numpy]'") from error

from userfault.arrays.opening import open_array
from userfault.arrays.paged import PagedArray
from userfault.arrays.recipe import ArrayRecipe

__all__ = ["ArrayRecipe", "PagedArray", "open_array"]
