"""How much memory a system takes, before it is loaded and while it answers.

`free.free_bytes` asks a device, `shape.shape_of` reads a model's configuration, `weights.weights_of` the headers of its
files; `rows.row_bytes` adds up a row, for `table.memory_table` and for `recmas.batching`, which chooses batches by it.
Estimates are upper bounds of what the runtime itself holds; allocators and libraries take some more, which `SAFETY`
leaves room for.
"""

from __future__ import annotations

SAFETY = 0.8
"""Share of a device's free memory that batches may fill."""
