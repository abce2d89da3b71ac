"""What users put into a part of a pipeline, and would be without once another module takes its place: adapters of images, attention
processors, caches and other hooks, FreeU, tokens."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from compressor.errors import UsageError
from compressor.foreign.sound import hooks_of_diffusers
from compressor.pipelines.opened import Opened
from compressor.weights import unwrapped


def refuse_lost(found: Opened, module: nn.Module, is_result: bool) -> None:
    """Raise UsageError where the part of `found` has what was put into it (an IP-Adapter, attention processors, FreeU), and `module`,
    of the same class, has not: pictures would be drawn without; or where it `is_result` of a model of another class."""
    own, new = unwrapped(found.module), unwrapped(module)
    if type(own) is not type(new):
        if is_result:
            raise UsageError(
                f"apply: the result is a {type(new).__name__}, and {found.part} is a {type(own).__name__}",
                "Name the part that it is of: part='unet', part='vae.decoder', …",
            )
        return
    before, after = _put_in(own), _put_in(new)
    if lost := [name for name, value in before.items() if after.get(name) != value]:
        raise UsageError(
            f"apply: {found.part} has {lost[0]} ({before[lost[0]]}), and the module that would take its place has not "
            f"({after.get(lost[0])})",
            "Put it into the pipeline after apply, or before the part is pruned; or apply the directory of a run, which changes the "
            "weights alone.",
        )
    if (grown := resized(own, new)) is not None:
        raise UsageError(
            f"apply: {found.part}: {grown} in the module that would take its place: tokens were added since (textual inversion)",
            "Load the textual inversion after apply, or prune the part that has it.",
        )


def resized(own: nn.Module, new: nn.Module) -> str | None:
    """The first table of embeddings in `own` that has more or fewer rows in `new`, in words."""
    tables = {name: one.num_embeddings for name, one in new.named_modules() if isinstance(one, nn.Embedding)}
    for name, one in own.named_modules():
        if isinstance(one, nn.Embedding) and tables.get(name, one.num_embeddings) != one.num_embeddings:
            return f"{name} has {one.num_embeddings:,} rows, and {tables[name]:,}"
    return None


def _put_in(module: nn.Module) -> dict[str, str]:
    """What users put into a model of diffusers, by its name: classes of attention processors, adapters of images, FreeU's numbers,
    hooks of diffusers and of their own."""
    found = {f"{name}: hooks".lstrip(": "): ", ".join(hooks) for name, hooks in hooks_of_diffusers(module).items()}
    found |= {
        f"{name}.processor": _processor(one.processor)
        for name, one in module.named_modules()
        if getattr(one, "processor", None) is not None
    }
    for name, one in module.named_modules():
        if name.endswith("encoder_hid_proj"):
            found[name] = type(one).__name__
        for hook in (*one._forward_pre_hooks.values(), *one._forward_hooks.values()):
            kind = hook if inspect.isroutine(hook) else type(hook)
            if str(kind.__module__).partition(".")[0] not in _LIBRARIES:
                found[f"{name}: a hook of its own".lstrip(": ")] = kind.__qualname__
        told = [getattr(one, number, None) for number in ("s1", "s2", "b1", "b2")]
        if any(number is not None for number in told):
            found[f"{name}: FreeU"] = str(told)
    return found


_PLAIN = (bool, int, float, str, type(None))
_LIBRARIES = ("torch", "functools", "transformers", "accelerate", "compressor")
"""Packages whose hooks on modules are no features that a user switched on."""


def _processor(processor: Any) -> str:
    """The class of an attention processor, and its numbers: how much of a picture's adapter it adds, for one."""
    held = sorted((name, value) for name, value in getattr(processor, "__dict__", {}).items() if name[0] != "_")
    plain = [(name, value) for name, value in held if all(isinstance(one, _PLAIN) for one in tree_leaves(value))]
    told = ", ".join(f"{name}={value}" for name, value in plain if name != "training")
    return f"{type(processor).__name__}({told})"
