"""`LinkConfig`: values that no link has are named, and a config survives JSON."""

from __future__ import annotations

import json

import pytest

from recmas_kernels import LinkConfig
from recmas_kernels.testing import configs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "middle"}, "kind is 'middle', expected one of inner, outer"),
        ({"residual": "gated"}, "residual is 'gated'"),
        ({"in_features": -1}, "in_features is -1"),
        ({"hidden_features": 2.5}, "hidden_features is 2.5"),
        ({"out_features": 9}, "needs in_features == out_features, got 8 and 9"),
        ({"layers": 3}, "layers is 3, expected one of 1, 2"),
        ({"activation": "relu"}, "activation is 'relu'"),
    ],
)
def test_bad_configs_are_named(values, message):
    base = {"kind": "inner", "in_features": 8, "hidden_features": 8, "out_features": 8, "residual": "identity"}
    with pytest.raises(ValueError, match=message):
        LinkConfig(**{**base, **values})


@pytest.mark.parametrize("kind", configs())
def test_a_config_survives_json(kind):
    config = configs()[kind]
    assert LinkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"), [({"gate": 1}, "unknown key 'gate'"), ({"residual": None}, "residual is None")]
)
def test_bad_objects_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LinkConfig.from_dict({**configs()["inner"].to_dict(), **change})


def test_a_missing_key_is_named():
    values = configs()["inner"].to_dict()
    del values["residual"]
    with pytest.raises(ValueError, match="^missing key 'residual'$"):
        LinkConfig.from_dict(values)
