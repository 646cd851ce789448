"""Systems and links of the reference implementation (arXiv 2604.25917): read from its files, and written back to them.

Its file formats and names are facts kept in `styles` and `weights`; its prompts stand nowhere here: they are read at
conversion time from the user's own clone of its code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recmas.upstream.convert import convert_upstream
    from recmas.upstream.export import link_to_safetensors, to_pt

__all__ = ["convert_upstream", "link_to_safetensors", "to_pt"]


def __getattr__(name: str) -> Any:
    """Load what needs torch on first use, so that ``recmas convert --help`` is fast."""
    if name == "convert_upstream":
        from recmas.upstream.convert import convert_upstream

        return convert_upstream
    if name in ("link_to_safetensors", "to_pt"):
        from recmas.upstream import export

        return getattr(export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
