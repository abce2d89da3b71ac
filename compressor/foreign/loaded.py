"""What other libraries loaded of a folder, held against what was in it: they only warn of weights that they did not find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from threading import RLock
from typing import Any

from torch import nn

from compressor.errors import CompressorError

Report = Mapping[str, Any]
"""What `from_pretrained` of diffusers and transformers gives with `output_loading_info`."""
_HINT = "The weights are of another configuration than config.json says, or the folder is incomplete: use another copy."
_TURN = RLock()


def misfits(model: nn.Module, report: Report) -> list[str]:
    """What `model` lacks of what its configuration asks for, and what was left over, in words; `report` says it, but for what the
    index of a folder lists and none of its files has, which has no values."""
    missing = {*report["missing_keys"], *(name for name, value in model.state_dict().items() if value.is_meta)}
    found = [f"missing {name}" for name in sorted(missing)]
    found += [f"unexpected {name}" for name in sorted(report["unexpected_keys"])]
    return found + [f"{n}: file has {tuple(a)}, model has {tuple(b)}" for n, a, b in report["mismatched_keys"]]


def refuse_misfits(model: nn.Module, wrong: list[str], where: object) -> None:
    """Raise CompressorError where `model`, loaded from `where`, has something `wrong`, with the first of it."""
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CompressorError(f"{where} does not fit {type(model).__name__}: {'; '.join(wrong[:4])}{more}", _HINT)


def refuse_partly_loaded(model: nn.Module, report: Report, where: object) -> None:
    """Raise CompressorError where `model` was loaded from `where` without some of its weights, which then have random values; or
    without something that a layer of it has there beside them: weights that were scaled mean nothing without their scales.

    What else is left over is of other parts: of the decoder of a model whose encoder alone is used, for one.
    """
    layers = {name for name, module in model.named_modules() if module._parameters}
    beside = [name for name in report["unexpected_keys"] if name.rpartition(".")[0] in layers]
    refuse_misfits(model, misfits(model, {**report, "unexpected_keys": beside}), where)


@contextmanager
def reported() -> Iterator[list[tuple[str, nn.Module, Report]]]:
    """A list of what `from_pretrained` of models of diffusers and transformers gives in the block: the folder, the model, the report.

    A pipeline loads its components by itself, and hands on no reports. Of several threads one at a time is in such a block.
    """
    from diffusers import ModelMixin

    kinds: list[Any] = [ModelMixin]
    with suppress(ImportError):
        from transformers import PreTrainedModel

        kinds.append(PreTrainedModel)
    found: list[tuple[str, nn.Module, Report]] = []
    with _TURN, ExitStack() as stack:
        for kind in kinds:
            before = vars(kind)["from_pretrained"]
            stack.callback(setattr, kind, "from_pretrained", before)
            kind.from_pretrained = classmethod(_reporting(before.__func__, found))
        yield found


def _reporting(plain: Any, found: list[tuple[str, nn.Module, Report]]) -> Any:
    """The method `plain`, which adds to `found`; not for models that it makes a model of."""
    inside = False

    def from_pretrained(cls: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside or "output_loading_info" in kwargs:
            return plain(cls, path, *args, **kwargs)
        inside = True
        try:
            model, report = plain(cls, path, *args, output_loading_info=True, **kwargs)
        finally:
            inside = False
        found.append((str(path), model, report))
        return model

    return from_pretrained
