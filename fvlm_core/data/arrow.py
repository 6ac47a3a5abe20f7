"""pyarrow's functions on columns. pyarrow makes them when it is imported, so a type checker knows none of their names."""

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
