"""Links and the models that they join, wherever these are, must be equally wide."""

from __future__ import annotations

from collections.abc import Mapping

from recmas.config.pattern import LinkKey
from recmas.config.system_json import edge_name
from recmas_kernels import RecursiveLink

Features = tuple[int, int]
"""What a link maps: features in, features out."""


def features(link: RecursiveLink) -> Features:
    return link.config.in_features, link.config.out_features


def check_widths(width: Mapping[str, int], inner: Mapping[str, Features], outer: Mapping[LinkKey, Features]) -> None:
    """Raise ValueError, naming the link, if it does not fit its models.

    Args:
        width: hidden size of every model, by role.
        inner: links by role.
        outer: links by key.
    """
    named = [(f"inner link of {role!r}", found, role, role) for role, found in inner.items()]
    named += [(f"outer link {edge_name(key)}", found, key[0], key[1]) for key, found in outer.items()]
    for name, found, source, target in named:
        if found != (width[source], width[target]):
            raise ValueError(
                f"{name} maps {found[0]} to {found[1]} features, the models need {width[source]} to {width[target]}"
            )
