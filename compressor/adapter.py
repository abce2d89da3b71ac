"""The Adapter interface: what fine-tuning must know of a model family, and no more."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from compressor.errors import CompressorError, UsageError, texts


@dataclass(frozen=True, eq=False)
class Shared:
    """A tensor among the inputs of a model that all samples of a batch share, as it is: it has no dim for the batch."""

    tensor: Tensor


def to_device(inputs: Any, device: torch.device) -> Any:
    """An adapter's `inputs` with every tensor on `device`, shared ones too, as `predict` takes them."""
    # the GPU copies from pinned memory when it comes to it; a CPU may not read before it is there
    queued = device.type == "cuda"
    return tree_map_only((Tensor, Shared), lambda leaf: plain(leaf).to(device, non_blocking=queued), inputs)


def cloned(inputs: Any) -> Any:
    """Inputs of `predict` in memory of their own: a model may write to those that it is given."""
    return tree_map_only(Tensor, Tensor.clone, inputs)


def plain(leaf: Tensor | Shared) -> Tensor:
    """The tensor of a leaf of inputs."""
    return leaf.tensor if isinstance(leaf, Shared) else leaf


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors of an adapter's `inputs`, in their order."""
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def samples_in(inputs: Any) -> int:
    """How many samples an adapter's `inputs` hold: the first dim that most of their tensors have.

    Raises CompressorError where none has a dim.
    """
    sizes = Counter(len(leaf) for leaf in tensors_of(inputs) if leaf.dim() > 0)
    if not sizes:
        raise CompressorError(
            "the inputs hold no tensor with a dim for the batch", "Give `noised` inputs that have one."
        )
    return sizes.most_common(1)[0][0]


def with_samples(inputs: Any, batch_size: int) -> Any:
    """An adapter's `inputs` with `batch_size` samples: those that they hold, repeated or cut; shared tensors as they are."""
    n = samples_in(inputs)
    rows = torch.arange(batch_size) % n

    def taken(leaf: Tensor | Shared) -> Tensor:
        if isinstance(leaf, Shared) or leaf.dim() == 0 or len(leaf) != n:
            return plain(leaf)
        return leaf[rows.to(leaf.device)]

    return tree_map_only((Tensor, Shared), taken, inputs)


def checked_pair(adapter: Adapter, batch: Any, found: Any) -> tuple[Any, Tensor]:
    """(inputs, target), which the adapter's `noised` `found` for `batch`.

    Raises CompressorError where that is no such pair, or the target has no sample, or fewer than a batch of tensors, and for images
    that the adapter cannot mean (`Adapter.signed`).
    """
    name = type(adapter).__name__
    if not isinstance(found, (tuple, list)) or len(found) != 2 or not isinstance(found[1], Tensor):
        raise CompressorError(f"{name}.noised gave {_named(found)}, not (inputs, target)", _PROMISES)
    inputs, target = found
    if target.is_complex():
        raise CompressorError(f"{name}.noised gave a complex target ({target.dtype})", _REAL)
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if adapter.signed and isinstance(first, Tensor) and first.dim() > 2:
        _check_signed(name, first)
    if not target.dim() or not len(target) or (isinstance(first, Tensor) and first.dim() and len(target) < len(first)):
        held = f"for {len(first)} samples" if isinstance(first, Tensor) and first.dim() else ""
        raise CompressorError(f"{name}.noised gave a target {tuple(target.shape)} {held}".rstrip(), _PROMISES)
    return inputs, target


def _check_signed(name: str, images: Tensor) -> None:
    """Raise CompressorError for `images` in whole numbers, and warn of those that are never below 0, where the adapter of this `name`
    takes pictures in [-1, 1]. A picture that is bright all over is no reason yet, nor is one that is grey."""
    if not images.is_floating_point():
        raise CompressorError(f"{name} takes images in [-1, 1], and these are {images.dtype}", _SIGNED)
    low, high = (float(value) for value in images.detach().aminmax()) if images.numel() else (0.0, 0.0)
    if len(images) >= _SEVERAL and 0 <= low < high:
        above = "none" if high <= 1 else "some"  # no figures: what repeats itself is shown once
        found = f"a batch has no number below 0 and {above} above 1"
        warnings.warn(f"{name} takes images in [-1, 1], and {found}. {_SIGNED}", stacklevel=3)


_SEVERAL = 4
_SIGNED = "Bytes: compressor.Images(NAME, pixels), or images / 127.5 - 1; numbers from 0 to 1: 2 * images - 1."


def checked_answer(adapter: Adapter, answer: Any, target: Tensor) -> Tensor:
    """The `answer` of the adapter's `predict`. Raises CompressorError unless it is a tensor of the shape of `target`, and real: a loss
    would spread the smaller one over the other, and drop imaginary parts."""
    name = type(adapter).__name__
    if not isinstance(answer, Tensor):
        raise CompressorError(f"{name}.predict gave {_named(answer)}, not a tensor", _PROMISES)
    if answer.shape != target.shape:
        wanted = f"the target of {name}.noised is {tuple(target.shape)}"
        raise CompressorError(f"{name}.predict gave {tuple(answer.shape)}, and {wanted}", _PROMISES)
    if answer.is_complex():
        raise CompressorError(f"{name}.predict gave a complex answer ({answer.dtype})", _REAL)
    return answer


def check_examples(adapter: Adapter, answer: Any, batch_size: int) -> None:
    """Raise CompressorError unless `answer`, to the `example_inputs` for `batch_size`, has a row for every sample."""
    if not adapter.fixed_batch and isinstance(answer, Tensor) and answer.dim() and len(answer) != batch_size:
        held = f"{type(adapter).__name__}.example_inputs({batch_size}) holds {len(answer)} samples, by what the model answers"
        how = "give as many as are asked for, or set `fixed_batch`"
        raise CompressorError(held, f"Times would go for another batch than they are of: {how}.")


_REAL = "Give torch.view_as_real of it: a loss drops imaginary parts."
_PROMISES = "noised gives (inputs, target), and predict a tensor like the target; help(compressor.Adapter) says more."


def _named(found: Any) -> str:
    return f"{type(found).__name__} of {len(found)}" if isinstance(found, (tuple, list, dict)) else type(found).__name__


def _rows(n: int, part: slice, leaf: Tensor | Shared) -> Tensor:
    if isinstance(leaf, Shared):
        return leaf.tensor
    return leaf[part] if leaf.dim() > 0 and leaf.shape[0] == n else leaf


_TAKES = "_compressor_takes"
_KEPT_WIDE = "_keep_in_fp32_modules"


def as_taken(inputs: Any, module: nn.Module) -> Any:
    """An adapter's `inputs` as a `module` in half precision takes them: what has two or more dims in its dtype, as pipelines do it."""
    dtype = dtype_taken(module, 2)
    if dtype not in (torch.float16, torch.bfloat16):
        return inputs
    return as_dtype(dtype, inputs)


def as_dtype(dtype: torch.dtype, values: Any) -> Any:
    """`values` with their floating-point tensors of two or more dims in `dtype`; times and the like, with fewer, stay as they are."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() and t.dim() > 1 else t, values)


def dtype_taken(module: nn.Module, dims: int = 0) -> torch.dtype | None:
    """The dtype of the inputs of `module`: that of its first weight of `dims` (0 or 2) dims or more; None where it has none.

    Left out are weights that a model of diffusers keeps in float32 whatever its dtype is. A lowered model was told it (`take_as`): its
    weights are no parameters any more. This is asked in every call, so it makes no names of parameters on its way where it need not.
    """
    wide: Sequence[str] = getattr(module, _KEPT_WIDE, None) or ()
    for name, own in module.named_parameters() if wide else ():
        if own.is_floating_point() and own.dim() >= dims and not any(part in name for part in wide):
            return own.dtype
    left = [module]
    while left:
        part = left.pop()
        if (told := part.__dict__.get(_TAKES)) is not None:
            return told[dims]  # type: ignore[no-any-return]
        for value in part._parameters.values():
            if value is not None and value.is_floating_point() and value.dim() >= dims:
                return value.dtype
        left += (inner for inner in reversed(part._modules.values()) if inner is not None)
    return None


def take_as(module: nn.Module, model: nn.Module) -> None:
    """Have `module`, whose weights are packed, take inputs as the `model` does that it was made of."""
    module.__dict__[_TAKES] = {dims: dtype_taken(model, dims) for dims in (0, 2)}


@dataclass(frozen=True, eq=False)
class Conditions:
    """A call of a model by its pipeline, taken apart: the noisy input (n, …) and its `name`, the `time`, and all else, which is the
    condition. That is by names with dots: `arrays` with a row per sample, tensors that all samples share, and `constants`, which are
    no tensors."""

    name: str
    noisy: Tensor
    time_name: str
    time: Any
    arrays: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    constants: Mapping[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How to sample, where the adapter's own way is not wanted: None keeps its own.

    `guidance` g mixes predictions with and without a label as `without + g (with - without)`; 1 is no guidance. `classes`: the
    labels to draw images of, in turn; where there are none, each image's is drawn from all.
    """

    sampler: str | None = None
    spacing: str | None = None
    guidance: float | None = None
    classes: tuple[int, ...] = ()


def with_rules(adapter: Adapter, targets: Sequence[str] | None, ignore: Sequence[str] | None) -> Adapter:
    """A copy of `adapter` with these rules for layers as its own; None keeps the adapter's.

    Raises UsageError where rules, the adapter's too, are no sequence of texts but one text.
    """
    changed = copy.copy(adapter)
    for name, rules in (("targets", targets), ("ignore", ignore)):
        if rules is None:
            texts(f"{name} of {type(adapter).__name__}", getattr(adapter, name))
        else:
            object.__setattr__(changed, name, texts(name, rules))  # adapters may be frozen
    return changed


class Adapter(ABC):
    """Connects a model family to the engine. `noised` and `predict` are enough to fine-tune; the rest adds features."""

    name: str = "custom"
    targets: Sequence[str] = ()
    """Rules for the layers that are pruned by default (see `compressor.sparsity.layers`); empty: all that the pattern fits."""
    ignore: Sequence[str] = ()
    defaults: Mapping[str, Any] = {}
    """Recipe settings that suit this model, below everything that the user says."""
    about: Mapping[str, str] = {}
    """Where weights and data come from: `source`, `licence`, `data`, `weights`."""

    family: str = ""
    """What its kind of network is called, such as `U-ViT`: `compressor check-plugin` tries methods on one model of each."""

    def small(self) -> Adapter | None:
        """This family in a size for tests, of some ten thousand parameters, to `build` with random weights. Default: None, there
        is none."""
        return None

    def fitted(self, shape: tuple[int, int, int], classes: int) -> Mapping[str, Any]:
        """The settings of `architecture` with which a new model of this family takes images of `shape` (channels, height, width)
        with so many `classes` (0: no labels), for training from scratch. Default: none, the model is as it is."""
        return {}

    @abstractmethod
    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        """(inputs, target) for one batch of data, on the CPU. All randomness comes from `rng`, a CPU generator.

        `inputs` is any nesting of tuples, lists and dicts; its tensors, like `target`, have the batch as dim 0, so that
        the engine can split a batch; one that has not, and is the same for all samples, is given as `Shared(tensor)`: it is
        never split, and `predict` sees the tensor. Student and teacher both see these very inputs.
        """

    def noised_evenly(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        """As `noised`, with times that are drawn with one in each n-th of their range, for a batch of n, in random order.

        For training (`train.times: even`): what it sees of the times varies less from batch to batch. Default: as `noised` draws them.
        """
        return self.noised(batch, rng)

    def noised_at(self, batch: Any, time: float, rng: torch.Generator) -> tuple[Any, Tensor]:
        """As `noised`, with the noise of one `time` for the whole batch: from 0 (none) to 1 (nothing but noise).

        For methods that look at times one after another. Default: the times that `noised` draws.
        """
        return self.noised(batch, rng)

    @abstractmethod
    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        """What `module` answers to `inputs`, shaped like `target`."""

    def conditions(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Conditions:
        """What a pipeline that calls the model with these arguments tells it, as data that `noised` takes: for captions.

        Raises CompressorError where it is not known which argument is which.
        """
        raise CompressorError(f"{self.name}: what its pipeline tells it is not known", "Record the pipeline's calls.")

    signed: bool = False
    """Whether images are taken as numbers around 0: pictures in [-1, 1], latents. Then whole numbers are refused, and batches that are
    never below 0 warned of."""

    answered: bool = False
    """Whether `target` is what the dense model itself answered: then no teacher is asked, and both losses are one."""

    def pieces(self, inputs: Any, target: Tensor, count: int) -> Iterator[tuple[Any, Tensor, float]]:
        """A batch in about `count` pieces, for gradients that are added up: (inputs, target, share of the batch) of each.

        Default: by rows; tensors that are `Shared`, or have no row for every sample, are in every piece.
        """
        n = target.shape[0]
        for rows in torch.arange(n).tensor_split(min(count, n)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            yield tree_map_only((Tensor, Shared), partial(_rows, n, part), inputs), target[part], len(rows) / n

    def sample(self, module: nn.Module, n: int, rng: torch.Generator, steps: int) -> Tensor:
        """`n` images (n, channels, height, width) in [-1, 1], from noise drawn from `rng`, in `steps` sampler steps."""
        raise CompressorError(f"{type(self).__name__} cannot sample", "Give the adapter a `sample` method.")

    def drawn_labels(self, n: int, rng: torch.Generator) -> Tensor | None:
        """The labels (n,) of the images that `sample` draws with an `rng` in the same state. Default: None, there are none."""
        return None

    def example_inputs(self, batch_size: int) -> Any:
        """Inputs for `predict`, for counting and timing; values do not matter."""
        raise CompressorError(f"{type(self).__name__} has no example inputs", "Give it an `example_inputs` method.")

    def exampled(self, inputs: Any) -> Adapter:
        """A copy of this adapter whose `example_inputs` are these `inputs` of `noised`, repeated to the batch size asked for.

        For adapters that cannot make examples of themselves; the inputs are those of a batch of data.
        """
        changed = copy.copy(self)
        object.__setattr__(changed, "example_inputs", partial(with_samples, inputs))  # adapters may be frozen
        return changed

    def build(self) -> nn.Module:
        """A new model of this configuration, with random weights."""
        raise CompressorError(f"{type(self).__name__} cannot build its model", "Give the adapter a `build` method.")

    def load(self, source: str | None) -> nn.Module:
        """The model with pretrained weights: those at `source` (a path), or the bundled ones where it is None."""
        raise CompressorError(f"{type(self).__name__} cannot load weights", "Give the adapter a `load` method.")

    def opened(self, source: str | None, architecture: Mapping[str, Any] = MappingProxyType({})) -> Adapter:
        """The adapter of the very model at `source`, for families whose files say how the model is built.

        `architecture` holds the user's own settings of it, which come on top. Raises UsageError where there can be none.
        """
        if architecture:
            raise UsageError(f"{self.name} takes no architecture", "Leave out the recipe's `architecture`.")
        return self

    @property
    def architecture(self) -> Mapping[str, Any]:
        """What `build` needs beyond the adapter's name, as JSON; it is saved with the model. Empty: the name is enough."""
        return {}

    def rebuilt(self, architecture: Mapping[str, Any]) -> Adapter:
        """The adapter of a saved model with this `architecture`."""
        if architecture:
            raise CompressorError(f"{self.name} takes no architecture", "The saved model is another adapter's.")
        return self

    of_pipelines: bool = False
    """Whether this family reads the models of any pipeline of diffusers: its rules for layers are then taken for their parts."""

    fixed_batch: bool = False
    """Whether `example_inputs` has a batch size of its own, whatever is asked for."""

    writes_pipeline: bool = False
    """Whether `write_pipeline` is there."""
    writes_reshaped: bool = False
    """Whether it takes models whose structure was made smaller, and raises ReshapedError where the other library has none such."""

    def write_pipeline(self, module: nn.Module, folder: Path) -> None:
        """Write `module` into the empty `folder` as other libraries know its family, with the rest of its pipeline."""
        raise CompressorError(f"{type(self).__name__} writes no pipeline", "Use compressor.save(..., packed=False).")

    def sampling(self, settings: Sampling) -> Adapter:
        """This adapter with another sampler; UsageError where it has no such one."""
        if settings != Sampling():
            raise UsageError(f"{self.name} has one sampler of its own", "Leave out sampler, spacing and guidance.")
        return self

    @property
    def unsampled(self) -> str:
        """Why this model cannot be sampled here, though the adapter has a `sample` method; empty where it can."""
        return ""

    num_classes: int = 0
    """How many labels the data must have; 0 where the model takes none."""

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(channels, height, width) of the images that the model takes, so that wrong data is refused; None: any."""
        return None

    @property
    def sampler(self) -> str:
        """The sampler's name and settings, for reports."""
        return "unnamed"
