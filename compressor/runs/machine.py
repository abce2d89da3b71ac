"""What `compressor doctor` finds: the machine, the kernels, the versions, and what is missing with how to get it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import torch

from compressor import registry
from compressor.environment import environment, usable_cores, versions_of
from compressor.errors import first_line
from compressor.lower import cusparselt_library
from compressor.lower.vnm_kernels import kernels

PACKAGE = "diffusion-compressor"
_FOR = {
    "onnx": "export to ONNX, and ONNX Runtime beside our kernels",
    "openvino": "OpenVINO beside our kernels",
    "cusparselt": "2:4 on NVIDIA GPUs with products planned once (the backend cusparselt-direct)",
    "torchao": "2:4 in fp8 on NVIDIA's Hopper, and AdamW in 8 bits on GPUs",
    "datasets": "data sets of Hugging Face (hf:OWNER/NAME)",
    "fid": "FID with the weights of Inception",
    "lora": "training of adapters (--train lora)",
    "pipelines": "pipelines with text encoders (Stable Diffusion, FLUX, …)",
    "trackers": "TensorBoard (--log-with tensorboard)",
    "nni": "pruners of NNI, in an environment of their own",
}
_NOT_FOR_USERS = ("test", "lint", "docs", "screens")
_FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "sve", "i8mm", "bf16"),
)
_INTERESTING = ("transformers", "onnxruntime", "openvino", "triton", "huggingface_hub", "peft")


def examined() -> dict[str, Any]:
    """Everything, as JSON: `versions`, `hardware`, `threads`, `instruction_sets`, `kernels`, `openmp`, `gpus`, `cusparselt`,
    `backends`, `extras`, and under `missing` what is not there, with the command that gets it."""
    facts = environment()
    compiled, note = kernels()
    found: dict[str, Any] = {
        **facts,
        "versions": facts["versions"] | versions_of(_INTERESTING),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_sets": instruction_sets(_read("/proc/cpuinfo")),
        "kernels": {
            "file": None if compiled is None else compiled.__file__,
            "levels": [] if compiled is None else list(compiled.levels()),
            "used": None if compiled is None else compiled.level(),
            "note": note,
        },
        "openmp": openmp_runtimes(_read("/proc/self/maps")),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "cusparselt": cusparselt_library.described() or None,
        "backends": backends(),
        "extras": extras(requires_of(PACKAGE), _installed),
    }
    return {**found, "missing": missing(found)}


def backends() -> dict[str, str | None]:
    """Each backend of lowering, and why it cannot run on any device of this machine; None where it can on one."""
    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    found: dict[str, str | None] = {}
    for name in registry.names("backends"):
        try:
            backend = registry.backend(name)
            reasons = [backend.unavailable(device) for device in devices]
        except (Exception, SystemExit) as error:  # a plugin of others
            reasons = [
                f"cannot be loaded: {first_line(error) if isinstance(error, Exception) else 'it ends the program'}"
            ]
        found[name] = None if None in reasons else without_device(reasons[-1] or "")
    return found


def without_device(reason: str) -> str:
    """The reason of a backend for a user who has no model in hand."""
    if re.search(r"NVIDIA GPUs?, the model is on", reason):
        return "needs an NVIDIA GPU"
    return re.sub(r", the model is on \S+$", "", reason)


def instruction_sets(cpuinfo: str) -> list[str]:
    """Those of the first processor in Linux's `/proc/cpuinfo` that kernels here, or of torch, use."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            known = set(value.split())
            return [flag for flag in _FLAGS if flag in known]
    return []


def openmp_runtimes(maps: str) -> list[str]:
    """The OpenMP runtimes in a process, by Linux's `/proc/self/maps`."""
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if ".so" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def extras(requirements: list[str], installed: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """Each extra of ours: what it is for, which of its packages are missing, and the command that installs it."""
    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        if (extra := re.search(r"""extra == ["']([\w-]+)["']""", requirement)) and extra[1] not in _NOT_FOR_USERS:
            name = re.match(r"[\w.-]+", requirement)
            packages.setdefault(extra[1], []).append(name[0] if name else requirement)
    return {
        extra: {
            "for": _FOR.get(extra, ""),
            "missing": [name for name in names if not installed(name)],
            "pip": f"pip install '{PACKAGE}[{extra}]'",
        }
        for extra, names in packages.items()
    }


def missing(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is missing or slow here, and how to get it."""
    lines = []
    note = found["kernels"]["note"]
    if note is not None:
        lines.append(
            {
                "what": note if found["kernels"]["file"] else "compiled CPU kernels",
                "how": "" if found["kernels"]["file"] else note,
            }
        )
    if found["threads"] < int(found["cores"]):
        lines.append(
            {
                "what": f"torch runs on {found['threads']} of {found['cores']:g} cores",
                "how": "unset OMP_NUM_THREADS, or raise it",
            }
        )
    if found["gpus"] and found["cusparselt"] is None:
        lines.append({"what": "cuSPARSELt for 2:4 on this GPU", "how": "install a torch for CUDA 12 or later"})
    for name, extra in found["extras"].items():
        if extra["missing"]:
            lines.append({"what": f"{name} ({extra['for']}): {', '.join(extra['missing'])}", "how": extra["pip"]})
    return lines


def requires_of(package: str) -> list[str]:
    """What an installed package requires, with its extras; nothing where it is not installed."""
    try:
        return requires(package) or []
    except PackageNotFoundError:
        return []


def _installed(package: str) -> bool:
    return bool(versions_of((package,)))


def _gpu(index: int) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(index)
    return {"name": about.name, "capability": f"{about.major}.{about.minor}", "memory_bytes": about.total_memory}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
