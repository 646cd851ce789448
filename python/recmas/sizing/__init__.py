"""How much memory a system takes, before it is loaded and while it answers.

`free_memory` asks a device, `model_bytes` reads a model's configuration, `checkpoint_bytes` the headers of its files;
`row_bytes` adds up a row, for the table in `report` and for `recmas.answering.batching`, which chooses batches by it.
Estimates are upper bounds of what the runtime itself holds; allocators and libraries take some more, for which `SAFETY`
leaves room. This room knows configurations and files, not loaded systems.
"""

from __future__ import annotations

BATCH_SIZE = 32
"""Rows answered at once where nothing else is asked for."""
SAFETY = 0.8
"""Share of a device's free memory that batches may fill."""
