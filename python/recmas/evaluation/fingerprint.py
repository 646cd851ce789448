"""What distinguishes one run's answers from another's, besides the system (`recmas.system.fingerprint`)."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def key_of(*described: Any) -> str:
    """16 hexadecimal digits for anything that can be written down."""
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
