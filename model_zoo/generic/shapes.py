"""What the inputs of a model look like, as JSON: enough to make examples of them where the data is not at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.adapter import Shared, plain, samples_in
from compressor.data.naming import flat, nested
from compressor.errors import UsageError

_KEPT, _KEPT_WHOLE = 256, 65_536  # so many numbers are kept; of others only the shape
_LARGEST = 2**28
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
_DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.bool, torch.uint8, torch.int8)}
_DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in (torch.int16, torch.int32, torch.int64)}


def of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What one sample of `inputs` looks like, by names with dots: `shape`, `dtype`, whether `shared`, and its `values`.

    Values are kept where they are few, or whole numbers (masks, sizes, which models branch on). Raises UsageError for what is
    neither a tensor nor JSON.
    """
    n = samples_in(inputs)
    return {name: _described(name, value, n) for name, value in flat(inputs).items()}


def _described(name: str, value: Any, n: int) -> dict[str, Any]:
    if not isinstance(value, (Tensor, Shared)):
        if value is not None and not isinstance(value, (str, int, float, bool)):
            raise UsageError(f"{name} is of type {type(value).__name__}", "Inputs are tensors, numbers or text.")
        return {"value": value}
    tensor = plain(value)
    shared = isinstance(value, Shared) or tensor.dim() == 0 or len(tensor) != n
    sample = tensor if shared else tensor[0]
    found: dict[str, Any] = {"shape": list(sample.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if sample.numel() <= (_KEPT if sample.is_floating_point() else _KEPT_WHOLE):
        found["values"] = sample.detach().cpu().flatten().tolist()
    return {**found, "shared": shared}


def is_sound(found: Any) -> bool:
    """Whether `found` is what `of` gives, in sizes that a model can take: it may come from a damaged file."""
    return isinstance(found, Mapping) and all(isinstance(one, Mapping) and _is_sound(one) for one in found.values())


def _is_sound(one: Mapping[str, Any]) -> bool:
    if "value" in one:
        return True
    shape, values = one.get("shape"), one.get("values")
    if not isinstance(shape, list) or one.get("dtype") not in _DTYPES or not isinstance(one.get("shared"), bool):
        return False
    if len(shape) > 8 or not all(isinstance(size, int) and 0 <= size <= _LARGEST for size in shape):
        return False
    numbers = isinstance(values, list) and all(isinstance(number, (int, float)) for number in values)
    return math.prod(shape) <= _LARGEST and (values is None or (numbers and len(values) == math.prod(shape)))


def made(found: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Inputs that look like `found`, of `batch_size` equal samples. Values that were not kept are 0; of masks, 1."""
    return nested({name: one["value"] if "value" in one else _made(one, batch_size) for name, one in found.items()})


def _made(one: Mapping[str, Any], batch_size: int) -> Tensor:
    dtype = _DTYPES[one["dtype"]]
    if "values" in one:
        sample = torch.tensor(one["values"], dtype=dtype).reshape(one["shape"])
    else:
        sample = torch.full(one["shape"], dtype == torch.bool, dtype=dtype)
    return sample if one["shared"] else sample.expand(batch_size, *sample.shape).clone()


def fitted(config: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
    """`config` of a new UNet2DModel or DiTTransformer2DModel with the sizes that images of `shape` (channels, height, width) with so
    many `classes` ask for; nothing where there is none. A DiT answers with a variance for each value too, as its authors' do."""
    if not config:
        return {}
    channels, height, width = shape
    own = {**config, "sample_size": height if height == width else [height, width], "in_channels": channels}
    if config["_class_name"] == "DiTTransformer2DModel":
        return {**own, "out_channels": 2 * channels, "num_embeds_ada_norm": classes}
    return {**own, "out_channels": channels, "num_class_embeds": classes or None}
