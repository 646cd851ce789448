"""``python -m recmas_kernels.info [--json]``: what is installed, built and loads, which kernels serve, and why not.

Needs torch only. Nothing here runs when ``recmas_kernels`` is imported.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from recmas_kernels.backends import choice, native, packing
from recmas_kernels.backends.call import Call
from recmas_kernels.version import __version__

PACKAGES = ("torch", "triton", "transformers", "safetensors", "huggingface_hub", "numpy")
MODULES = ("tensors", "cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = (8, 512)  # latents of a rollout step, and of a training batch
FEATURES = 1024
ROWS = {  # op: what the page calls it
    "link_fwd": "link, inference",
    "link_fwd_train": "link, training forward",
    "link_bwd": "link, training backward",
    "handoff_fwd": "handoff into a copy",
    "handoff_": "handoff in place",
    "handoff_bwd": "handoff, backward",
    "alignment_fwd": "alignment loss and gradient",
}


def collect() -> dict[str, Any]:
    """Everything the command prints, as one JSON object."""
    built = _build_record()
    return {
        "recmas_kernels": __version__,
        "folder": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "packages": {name: _package_version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "devices": _devices(),
        "modules": {name: built.get(name, {}) | _loaded(name) for name in MODULES},
        "instruction_set": _instruction_set(),
        "requested_backend": choice.requested(),
        "backends": {device: _backends(device) for device in _device_types()},
        "chosen": {device: _chosen(device) for device in _device_types()},
        "packed_weight_bytes": packing.packed_bytes(),
    }


def _build_record() -> dict[str, dict[str, Any]]:
    record = Path(__file__).with_name("_build.json")
    if not record.is_file():
        nothing = {"status": "not built", "reason": f"no {record.name}: nothing was ever built here", "log": []}
        return {name: dict(nothing) for name in MODULES}
    return json.loads(record.read_text(encoding="utf-8"))


def _loaded(name: str) -> dict[str, Any]:
    try:
        native.load(name)
    except ImportError as error:
        return {"loads": False, "load_error": str(error)}
    return {"loads": True, "load_error": None}


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _devices() -> list[str]:
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"cuda:{index} {torch.cuda.get_device_name(index)} sm_{major}{minor}")
    return names


def _instruction_set() -> dict[str, str | None]:
    """The CPU kernels' variant in use, why that one, and the library that it leaves products to."""
    reason = choice.load("cpu").unavailable()
    if reason is not None:
        return {"used": None, "reason": reason, "large_float32_products": None}
    cpu = choice.load("cpu")
    used, why = cpu.instruction_set()
    return {"used": used, "reason": why, "large_float32_products": cpu.library()}


def _call(op: str, device: str, dtype: torch.dtype, tokens: int) -> Call:
    hidden = FEATURES if op.startswith("link") else 0
    training = op in ("link_fwd_train", "link_bwd", "handoff_bwd")
    return Call(op, device, dtype, tokens, FEATURES, hidden, FEATURES, training)


def _backends(device: str) -> dict[str, str | None]:
    """For each backend that is tried for the device, why it cannot serve at all; None if it can."""
    reasons: dict[str, str | None] = {}
    for name in choice.order(device):
        try:
            module = choice.load(name)
        except ModuleNotFoundError as error:
            reasons[name] = f"this build does not contain it ({error})"
        else:
            reasons[name] = module.unavailable() if name != "reference" else None
    return reasons


def _chosen(device: str) -> dict[str, dict[str, str]]:
    """``{op: {"float32 x 8": backend}}`` for the sampled dtypes and token counts, at width 1024."""
    return {
        op: {
            f"{str(dtype).removeprefix('torch.')} x {tokens}": _choice(_call(op, device, dtype, tokens))
            for dtype in DTYPES
            for tokens in TOKENS
        }
        for op in ROWS
    }


def _choice(call: Call) -> str:
    try:
        return choice.choose(call).__name__.rpartition(".")[2]
    except choice.BackendUnavailableError:
        return "none"


def render(info: dict[str, Any]) -> str:
    """The page for people."""
    lines = [
        f"recmas-kernels {info['recmas_kernels']} in {info['folder']}",
        f"Python {info['python']} on {info['platform']}",
        f"processor: {info['processor']}, {info['threads']} threads",
        "packages: " + ", ".join(f"{name} {version or 'absent'}" for name, version in info["packages"].items()),
        f"devices: cpu{''.join(', ' + device for device in info['devices'])}"
        + (f" (torch's CUDA {info['torch_cuda']})" if info["torch_cuda"] else " (torch without CUDA)"),
        "",
        "compiled modules",
    ]
    for name, module in info["modules"].items():
        lines.append(
            f"  _{name}: {module.get('status', 'no record')}, {'loads' if module['loads'] else 'does not load'}"
        )
        if module.get("compilers"):
            lines.append(f"    compiled by {', '.join(module['compilers'])}")
        if module.get("reason"):
            lines.append(f"    {module['reason']}")
        elif not module["loads"]:
            lines.append(f"    {module['load_error']}")
        lines += [f"    | {line}" for line in module.get("log", []) if not module["loads"]]
    isa = info["instruction_set"]
    lines += ["", f"instruction set: {isa['used'] or 'none'} ({isa['reason']})"]
    if isa["large_float32_products"]:
        lines.append(f"large float32 products: {isa['large_float32_products']}")
    lines.append(f"packed weights: {info['packed_weight_bytes']} bytes")
    if info["requested_backend"] != "auto":
        lines.append(f"backend asked for: {info['requested_backend']}")
    for device, reasons in info["backends"].items():
        lines += ["", f"kernels for {device} tensors (dtype x tokens, width {FEATURES})"]
        table = info["chosen"][device]
        columns = list(next(iter(table.values())))
        lines.append("  " + " " * 29 + "".join(f"{column:<16}" for column in columns))
        lines += [f"  {ROWS[op]:<29}" + "".join(f"{table[op][column]:<16}" for column in columns) for op in table]
        lines += [f"  {name} cannot serve: {reason}" for name, reason in reasons.items() if reason]
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page, or the JSON object. The exit code is 0 whatever is missing, since saying so is the job."""
    parser = argparse.ArgumentParser(prog="python -m recmas_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a page")
    options = parser.parse_args(arguments)
    try:
        info = collect()
    except ValueError as error:  # RECMAS_BACKEND or RECMAS_CPU_ISA names nothing that exists
        print(f"recmas_kernels.info: {error}", file=sys.stderr)
        return 2
    print(json.dumps(info, indent=1) if options.json else render(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
