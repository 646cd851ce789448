"""Which rows ``recmas train`` trains on: files or data sets of the hub, and what their columns become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from recmas.cli.parser import COLUMNS, CommandLineParser

if TYPE_CHECKING:
    from jsonargparse import Namespace


class Data(NamedTuple):
    """Rows as the stages' functions take them (``rows``, ``texts``, ``validation``), and what they are, by stage.

    A stage that measures no validation rows has None.
    """

    given: dict[str, Any]
    described: dict[str, dict[str, Any]]
    validation: dict[str, dict[str, Any] | None]


def add_data(command: CommandLineParser, stage: str) -> None:
    """The options of a stage."""
    command.add_argument(
        "--data",
        type=str,
        required=stage in ("outer", "all"),
        help='JSONL or parquet file, or OWNER/NAME on the hub; rows carry "targets": {role: text or [text per round]}',
    )
    if stage != "outer":
        command.add_argument(
            "--texts",
            type=str,
            default=None,
            help="instead of --data (of train all: in its first two stages): any texts, from a file or the hub; rows "
            'carry "text", and "prompt" where the text answers one',
        )
    command.add_argument(
        "--validation", type=str, default=None, help="rows as --data; the links with least loss on them are kept"
    )
    command.add_argument(
        "--column",
        type=COLUMNS,
        default={},
        help="what columns become: question=problem,targets.solver=answer; beside --data, text and prompt are those of "
        "--texts (default: as they are)",
    )
    command.add_argument("--split", type=str, default="train", help="of data sets on the hub")
    command.add_argument("--validation-split", type=str, default="validation", help="of --validation on the hub")
    command.add_argument("--subset", type=str, default=None, help="of data sets on the hub")


def read_data(stage: str, options: Namespace) -> Data:
    """The rows that the options name."""
    from recmas.prompts.source import read_source, with_columns
    from recmas.training import read_texts
    from recmas.training.run_record import described

    texts, columns = options.get("texts"), dict(options.column)
    if stage != "all" and (options.data is None) == (texts is None):
        raise ValueError("give either --data FILE.jsonl or --texts FILE.jsonl|HUB_ID")
    of_texts = columns
    if None not in (options.data, texts):
        of_texts = {field: columns.pop(field) for field in ("text", "prompt") if field in columns}
    given: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    if options.data is not None:
        given["rows"] = with_columns(read_source(options.data, options.split, options.subset), columns, options.data)
        stages = dict.fromkeys(("inner", "warmup", "outer"), described(options.data, given["rows"]))
    if texts is not None:
        read = read_texts(texts, split=options.split, subset=options.subset, columns=of_texts)
        given["rows" if options.data is None else "texts"] = read
        stages |= dict.fromkeys(("inner", "warmup"), described(texts, read))
    validation: dict[str, dict[str, Any] | None] = dict.fromkeys(stages)
    if options.validation is not None:
        read = read_source(options.validation, options.validation_split, options.subset)
        given["validation"] = with_columns(read, columns, options.validation)
        measured = ("outer",) if "texts" in given else stages
        validation |= dict.fromkeys(measured, described(options.validation, given["validation"]))
    return Data(given, stages, validation)
