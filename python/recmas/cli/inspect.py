"""``recmas inspect``: a system's parts; with questions, what its latents look like to their readers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from recmas.cli.common import add_answering, add_offload, add_system, dump, loaded, read_questions
from recmas.cli.parser import CommandLineParser

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from recmas.answering.answers import Handoff
    from recmas.recursive_mas import RecursiveMAS


def add_options(parser: CommandLineParser) -> None:
    add_system(parser)
    add_offload(parser)
    parser.add_argument("--questions", type=str, default=None, help="JSONL file: show the latents of these rows")
    parser.add_argument("--question", type=str, default=None, help="show the latents of this question")
    add_answering(parser, ("rounds", "latent_steps"))
    parser.add_argument("--nearest", type=PositiveInt, default=3, help="tokens shown per latent")


def execute(options: Namespace) -> int:
    rows = [] if options.questions is None and options.question is None else read_questions(options)
    with loaded(options) as mas:
        shown: dict[str, Any] = parts(mas)
        if rows:
            answers = mas.answer(
                rows, rounds=options.rounds, latent_steps=options.latent_steps, max_new_tokens=32, trace=True
            )
            shown["questions"] = [
                {
                    "answer": answer.text,
                    "handoffs": [seen(mas, handoff, options.nearest) for handoff in answer.handoffs],
                }
                for answer in answers
            ]
    if options.json:
        dump(shown)
    else:
        print(render(shown))
    return 0


def parts(mas: RecursiveMAS) -> dict[str, Any]:
    """Pattern, agents and links, as JSON."""
    from recmas.agents.checking import proofs_of, switched_off
    from recmas.config.system_json import edge_name
    from recmas.training.proofs import TRAINING

    agents = {
        role: {
            "architecture": type(agent.model).__name__,
            "parameters": sum(weight.numel() for weight in agent.model.parameters()),
            "width": agent.hidden_size,
            "dtype": str(agent.dtype).removeprefix("torch."),
            "context": agent.context_length,
            "embedding_rms": agent.embedding_rms(),
            "off": switched_off(proofs_of(agent.model, tuple(TRAINING))),
        }
        for role, agent in mas.agents.items()
    }
    links = {
        name: {
            "features": [link.config.in_features, link.config.hidden_features, link.config.out_features],
            "parameters": sum(weight.numel() for weight in link.parameters()),
            "gain": None if link.norm_out is None else link.norm_out.weight.float().square().mean().sqrt().item(),
        }
        for name, link in [
            *mas.inner_links.items(),
            *((edge_name(edge), link) for edge, link in mas.outer_links.items()),
        ]
    }
    return {"stages": mas.pattern.stages, "agents": agents, "links": links}


def seen(mas: RecursiveMAS, handoff: Handoff, nearest: int) -> dict[str, Any]:
    """One handoff in the receiver's space: rms of each latent, and the tokens whose embeddings point its way most."""
    from recmas.config.pattern import link_key
    from recmas.system.nearest import nearest_tokens, received

    assert handoff.latents is not None
    member = mas.member(handoff.target)
    sent = mas.pattern.sent(handoff.source, handoff.target, handoff.round)
    key = link_key(member.outer_links, handoff.source, handoff.target, sent)
    states = received(member, key, handoff.latents)
    found = nearest_tokens(member, key, handoff.latents, nearest)
    return {
        "round": handoff.round,
        "source": handoff.source,
        "target": handoff.target,
        "latents": [
            {"rms": state.square().mean().sqrt().item(), "nearest": tokens}
            for state, tokens in zip(states, found, strict=True)
        ],
    }


def render(shown: dict[str, Any]) -> str:
    """`parts` and handoffs as a page."""
    lines = ["stages: " + " > ".join(", ".join(stage) for stage in shown["stages"])]
    for role, agent in shown["agents"].items():
        lines.append(
            f"agent {role}: {agent['architecture']}, {agent['parameters']:,} parameters, width {agent['width']}, "
            f"{agent['dtype']}, context {agent['context']}, embedding rms {agent['embedding_rms']:.4f}"
        )
        lines += [f"  without {feature}: {text}" for feature, text in agent["off"].items()]
    for name, link in shown["links"].items():
        gain = "" if link["gain"] is None else f", gain rms {link['gain']:.4f}"
        sizes = " > ".join(map(str, link["features"]))
        lines.append(f"link {name}: {sizes}, {link['parameters']:,} parameters{gain}")
    for index, question in enumerate(shown.get("questions", [])):
        lines.append(f"question {index}: {question['answer']}")
        for handoff in question["handoffs"]:
            lines.append(f"  round {handoff['round']}, {handoff['source']} to {handoff['target']}")
            for place, latent in enumerate(handoff["latents"], start=1):
                nearest = ", ".join(f"{token} {cosine:.2f}" for token, cosine in latent["nearest"].items())
                lines.append(f"    {place}: rms {latent['rms']:.4f}, nearest {nearest}")
    return "\n".join(lines)
