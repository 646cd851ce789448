"""Options and steps that several commands share."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from recmas.answering.options import MODES, SETTLED, AnswerOptions
from recmas.cli.fields import SWITCH_OFF, add_fields, read_fields
from recmas.cli.parser import BATCH_SIZE, DEVICES, LATENT_STEPS, NAMES, CommandLineParser
from recmas.dtypes import DTYPES
from recmas.evaluation import METRICS
from recmas.files.json_lines import to_lines
from recmas.files.reading import check_output as refuse_special

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from recmas.recursive_mas import RecursiveMAS
    from recmas.tools import Toolbox


def add_accelerate(parser: CommandLineParser) -> None:
    """``--no-accelerate``."""
    parser.add_argument(
        "--no-accelerate",
        action="store_true",
        help="on a CPU, leave agents' frozen linear layers as they are, not packed for the kernels (slower)",
    )


def add_system(parser: CommandLineParser) -> None:
    """The system and how it is loaded."""
    parser.add_argument("system", type=str, help="folder of the system")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    add_device(parser)
    parser.add_argument(
        "--backend",
        type=str,
        default=None,
        help="kernels: auto, reference, cpu, cuda or triton; a named one never falls back (default: what "
        "RECMAS_BACKEND names, else auto)",
    )
    add_accelerate(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_device(parser: CommandLineParser) -> None:
    """Where models are, and how they are loaded."""
    parser.add_argument(
        "--device",
        type=DEVICES,
        default="cpu",
        help="where agents and their links are: cpu, cuda, cuda:1, ..., or by role: planner=cuda:0,solver=cuda:1 "
        "(others: cpu)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=list(DTYPES),
        help="of models and links; auto: models as the system says, links float32",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with a checkpoint")
    parser.add_argument(
        "--allow-outside", action="store_true", help="load models and links that the system names in other folders"
    )
    parser.add_argument("--allow-hub", action="store_true", help="load models that the system names on the hub")


def add_offload(parser: CommandLineParser) -> None:
    """How agents share a device."""
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep weights in host memory and copy each agent's to its device for its visits alone: the device has to "
        "hold the largest agent, not all of them",
    )


_KINDS: dict[str, Any] = {
    "mode": MODES,
    "rounds": PositiveInt,
    "settle": float,
    "latent_steps": LATENT_STEPS,
    "max_new_tokens": NonNegativeInt,
    "temperature": float,
    "top_p": float,
    "batch_size": BATCH_SIZE,
    "prefix_reuse": SWITCH_OFF,
}
EXCHANGE = ("mode", "rounds", "latent_steps")
"""Fields of `AnswerOptions`: what agents send to each other, and how often."""
ANSWERING = tuple(field.name for field in fields(AnswerOptions) if field.name not in ("trace", "tools"))
"""All fields but those that have commands or options of their own: inspect traces, `add_tools` names tools."""
DECODING = tuple(name for name in ANSWERING if name not in EXCHANGE)


def add_answering(parser: CommandLineParser, names: Sequence[str] = ANSWERING) -> None:
    """How questions are answered: options for these fields of `AnswerOptions`."""
    add_fields(parser, AnswerOptions, _KINDS, names)


def add_data(parser: CommandLineParser) -> None:
    """Questions with their answers, and when a text counts as one."""
    parser.add_argument(
        "--data", type=str, required=True, help="questions with answers: a JSONL file, or OWNER/NAME on the hub"
    )
    parser.add_argument("--split", type=str, default="test", help="of a data set on the hub")
    parser.add_argument("--subset", type=str, default=None, help="of a data set on the hub")
    parser.add_argument("--question-field", type=str, default="question", help="field of a row that is the question")
    parser.add_argument("--answer-field", type=str, default="answer", help="field of a row that holds the answer")
    parser.add_argument(
        "--metric",
        default="exact",
        choices=list(METRICS),
        help="exact (whole text), last_word (case and punctuation count in both), begins (with the answer), choice (a "
        "letter) or math (needs the eval extra)",
    )


def read_rows(options: Namespace, limit: int | None = None) -> list[dict[str, object]]:
    """The rows that `add_data`'s options name."""
    from recmas.evaluation.data import read_data

    return read_data(
        options.data,
        split=options.split,
        subset=options.subset,
        question_field=options.question_field,
        limit=limit,
    )


def add_compile(parser: CommandLineParser) -> None:
    """How single steps run."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="run single steps, latents and tokens, through torch.compile: the first call of each bucket of batch "
        "sizes and lengths is far slower than the others, and needs a C++ compiler on a CPU",
    )


def answer_options(options: Namespace, names: Sequence[str] = ANSWERING, **others: Any) -> AnswerOptions:
    """The `AnswerOptions` of `add_answering`'s options, with `others` in their place."""
    return AnswerOptions(**read_fields(options, AnswerOptions, _KINDS, names) | others)


def settling(options: Namespace, auto: bool) -> dict[str, Any]:
    """Fields of `AnswerOptions` that ``--rounds auto`` and --settle set."""
    if not auto:
        return {"settle": options.settle}
    return {"rounds": None, "settle": SETTLED if options.settle is None else options.settle}


def add_tools(parser: CommandLineParser) -> None:
    """What the answering agent may call."""
    parser.add_argument(
        "--tools",
        type=NAMES,
        default=[],
        help="tools that the answering agent may call: python, which runs the model's programs in a sandbox (recmas "
        "info says in which)",
    )
    parser.add_argument("--max-tool-calls", type=NonNegativeInt, default=5, help="calls of tools per answer")
    add_unsafe(parser, "the programs of --tools")


def add_unsafe(parser: CommandLineParser, what: str) -> None:
    """Whether foreign code may run without a sandbox."""
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help=f"run {what} WITHOUT a sandbox: as this user, with its files, processes and network",
    )


def sandbox(options: Namespace) -> str | None:
    """The sandbox that `add_unsafe`'s option asks for; None is the first that works here."""
    return "none" if options.unsafe else None


def toolbox(options: Namespace) -> Toolbox | tuple[()]:
    """The tools that `add_tools`'s options name."""
    if not options.tools:
        return ()
    from recmas.tools import SHIPPED, Toolbox

    for name in options.tools:
        if name not in SHIPPED:
            raise ValueError(f"--tools: unknown tool {name!r}; there is {', '.join(SHIPPED)}")
    return Toolbox([SHIPPED[name](sandbox(options)) for name in options.tools], max_calls=options.max_tool_calls)


def chosen_backend(options: Namespace) -> contextlib.AbstractContextManager[None]:
    """The block in which --backend serves; without the option, what RECMAS_BACKEND names does."""
    from recmas_kernels import use_backend

    return contextlib.nullcontext() if options.backend is None else use_backend(options.backend)


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """What is imported within is not looked through for garbage, neither now nor when the process ends."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        atexit.register(gc.freeze)
        if enabled:
            gc.enable()


@contextlib.contextmanager
def loaded(options: Namespace, folder: Path | None = None) -> Iterator[RecursiveMAS]:
    """The system that `add_system`'s options name (or that in `folder`), served by the backend they name."""
    from recmas.config.system_json import read_spec

    system = options.system if folder is None else folder
    read_spec(system)  # a broken file ends here, before torch has loaded
    with _nothing_collected():
        import transformers

        from recmas.recursive_mas import RecursiveMAS

    transformers.utils.logging.disable_progress_bar()
    with chosen_backend(options):
        yield RecursiveMAS.from_pretrained(
            system,
            options.device,
            options.dtype,
            options.trust_remote_code,
            offload=options.get("offload", False),
            compile=options.get("compile", False),
            accelerate=not options.no_accelerate,
            allow_outside=options.allow_outside,
            allow_hub=options.allow_hub,
        )


def dump(value: Any) -> None:
    """Print JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def check_output(path: str | None) -> None:
    """Refuse an --output that cannot become a file, before any work is done for it."""
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"--output: {path} is a folder, expected the name of a JSONL file")
    refuse_special(Path(path))
    above = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"--output: {above} is a file, expected a folder to write {Path(path).name} into")


def write_lines(path: str, records: list[dict[str, Any]]) -> None:
    """Write records as JSON lines, whole or not at all."""
    from recmas.files import write_atomically

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), to_lines(records))


def read_questions(options: Namespace) -> list[dict[str, object]]:
    """The rows of --questions, or the one of --question."""
    from recmas.prompts.jsonl import read_rows

    if (options.questions is None) == (options.question is None):
        raise ValueError("give either --questions FILE.jsonl or --question TEXT")
    return [{"question": options.question}] if options.questions is None else read_rows(options.questions)
