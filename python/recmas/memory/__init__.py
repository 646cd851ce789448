"""How much memory a system takes, before it is loaded and while it answers.

`free.free_bytes` asks a device, `shape.shape_of` reads a model's configuration, `weights.weights_of` the headers of its
files; `table.memory_table` adds them up, and `batches.Planner` chooses batches by them. Estimates are upper bounds of
what the runtime itself holds; allocators and libraries take some more, which `SAFETY` leaves room for.
"""

from __future__ import annotations

SAFETY = 0.8
"""Share of a device's free memory that batches may fill."""
