"""`veneer doctor`: what this machine has, and what does not fit together."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from veneer.cli.output import table, version
from veneer.study import format

CORE = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy", "rich", "PyYAML")
EXTRAS = {
    "datasets": "data",
    "pillow": "data",
    "matplotlib": "report",
    "bitsandbytes": "quant",
    "torchao": "quant",
    "trl": "trl",
    "gguf": "carriers",
    "onnx": "carriers",
    "sentencepiece": "carriers",
    "peft": "test",
    "timm": "test",
    "diffusers": "diffusion",
}
"""Optional packages and the extra of `pip install "veneer[…]"` that brings them."""
COMPANIONS = ("torchvision", "torchaudio")


def doctor() -> Any:
    """Check the installation: versions, builds that do not fit, devices, carriers of models and data."""
    versions = {name: installed(name) for name in (*CORE, *COMPANIONS, *EXTRAS)}
    troubles = [f"{name} is missing: pip install {name}" for name in CORE if versions[name] is None]
    troubles += mismatches(versions)
    print(f"veneer {version()}, python {platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})\n")
    table(("package", "version", "note"), [(name, versions[name] or "–", _note(name, versions[name])) for name in versions])
    devices = _devices(troubles) if versions["torch"] else {}
    print()
    for name, value in devices.items():
        print(f"{name:<12}{value}")
    carriers = _carriers()
    print("\nmodels and data for the demo and the tests:")
    table(
        ("name", "found", "to get it"), [(c["name"], "yes" if c["found"] else "no", "" if c["found"] else c["install"]) for c in carriers]
    )
    print()
    for line in troubles or ["Nothing wrong was found."]:
        print(line)
    return {
        "veneer": version(),
        "python": platform.python_version(),
        "versions": versions,
        "devices": devices,
        "carriers": carriers,
        "troubles": troubles,
    }


def installed(name: str) -> str | None:
    """A package's version, read from its metadata without importing it; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def mismatches(versions: dict[str, str | None]) -> list[str]:
    """One sentence for each of torchvision and torchaudio that was built for another torch."""
    torch = versions.get("torch")
    if torch is None:
        return []
    found = []
    for name in COMPANIONS:
        version = versions.get(name)
        if version is None:
            continue
        wanted = _wants(name)
        if wanted and wanted != torch.partition("+")[0]:
            found.append(
                f"{name} {version} was built for torch {wanted}, but torch {torch} is here: importing it fails. "
                f"veneer does not need it: pip uninstall {name}, or install the {name} that belongs to torch {torch}."
            )
        elif _build(version) != _build(torch) and _build(version) and _build(torch):
            found.append(
                f"{name} is a {_build(version)} build, torch a {_build(torch)} build: its operators will not load. "
                f"Install both from the same index, or pip uninstall {name}; veneer does not need it."
            )
    return found


def _wants(name: str) -> str | None:
    """The exact torch version that a companion package asks for, if it asks for one."""
    for line in metadata.requires(name) or []:
        requirement, _, condition = line.partition(";")
        package, _, version = requirement.replace("(", "").replace(")", "").replace(" ", "").partition("==")
        if package == "torch" and version and "extra" not in condition:
            return version
    return None


def _build(version: str) -> str:
    return version.partition("+")[2]


def _note(name: str, version: str | None) -> str:
    if version is None and name in EXTRAS:
        return f'optional: pip install "veneer[{EXTRAS[name]}]"'
    return "not needed by veneer" if name in COMPANIONS else ""


def _devices(troubles: list[str]) -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        troubles.append(f"torch does not import: {str(error).splitlines()[0]}. Install it again.")
        return {}
    import psutil

    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use, {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{format.size(memory.available)} free of {format.size(memory.total)}",
        "cpu bf16": "fast" if _fast_bf16() else "emulated and slow: fp32 is the default here",
        "torch build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only",
    }
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        found[f"gpu {i}"] = f"{card.name}, {format.size(card.total_memory)}, {bf16}"
    if torch.backends.mps.is_available():
        found["gpu"] = "Apple MPS"
    return found


def _fast_bf16() -> bool:
    """Whether the CPU multiplies in bfloat16 itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8").split("flags", 1)[1].splitlines()[0]
    except (OSError, IndexError):
        return platform.machine() == "arm64"
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _carriers() -> list[dict[str, Any]]:
    from veneer import assets

    return [{"name": name, "found": assets.available(name), "install": line} for name, line in assets.INSTALL.items()]
