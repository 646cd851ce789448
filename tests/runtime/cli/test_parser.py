"""Options that take several values: as words on the command line, and as they stand in YAML."""

from __future__ import annotations

import pytest

from recmas.cli import eval as evaluation
from recmas.cli.parser import COUNTS, NAMES, CommandLineParser, some_of


@pytest.mark.parametrize(
    ("kind", "written", "value"),
    [
        (COUNTS, "1, 2", (1, 2)),
        (COUNTS, [1, 2], (1, 2)),
        (COUNTS, 3, (3,)),
        (NAMES, "python, search", ["python", "search"]),
        (NAMES, ["python"], ["python"]),
        (NAMES, [], []),
        (some_of(("latent", "text")), "text, latent", ("text", "latent")),
        (some_of(("latent", "text")), ["latent"], ("latent",)),
    ],
)
def test_several_values(kind, written, value):
    assert kind(written) == value
    assert kind(value) == value  # a configuration is read again as it was written


def test_a_name_that_is_none_of_them():
    with pytest.raises(ValueError, match="^'song' is not one of latent, text$"):
        some_of(("latent", "text"))("latent,song")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0,16", (0, 16)),
        ("planner=2,solver=3", ({"planner": 2, "solver": 3},)),
        ([4, {"planner": 2}], (4, {"planner": 2})),
        ({"planner": 2}, ({"planner": 2},)),
    ],
)
def test_latent_steps_to_sweep(written, value):
    parser = CommandLineParser()
    evaluation.add_options(parser)
    kind = next(action.type for action in parser._actions if action.dest == "latent_steps")
    assert kind(written) == value
    with pytest.raises(ValueError, match=r"1\.5"):
        kind([{"planner": 1.5}])


def test_options_are_made_for_the_chosen_command_alone():
    made = []
    parser = CommandLineParser(["--flag", "second", "first", "word"])
    summaries = {"first": "does this", "second": "does that"}
    parser.add_commands("what", summaries, lambda name, command: made.append((name, command.words)))
    assert made == [("second", ["first", "word"])]
    help_text = parser.format_help()
    assert "does this" in help_text
    assert "does that" in help_text
