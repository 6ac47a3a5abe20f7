"""pyarrow's compute functions. pyarrow generates them when it is imported, so type checkers do not know them."""

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
