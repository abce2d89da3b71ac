"""One run of fine-tuning shared by the processes of a launch: torch's DistributedDataParallel, or FSDP2 where the model is too large.

The batch and its noise are drawn whole, by seed and step, in every process; each then takes its share. Gradients are averaged, so that
the weights do not depend on how many there are, beyond the rounding of sums.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from compressor.adapter import Adapter, Shared, plain
from compressor.data.batches import Batches
from compressor.errors import CompressorError, UsageError
from compressor.processes import ranks, team
from compressor.seeds import repeatable
from compressor.sparsity.layers import Layer
from compressor.sparsity.pattern import Mask
from compressor.sparsity.surgery import Surgery
from compressor.training import shards
from compressor.training.answers import masks_of, prepared, restoring
from compressor.training.pruner import Pruner
from compressor.training.settings import Training
from compressor.weights import raw


def check_ranks(training: Training) -> None:
    """Raise UsageError where a run with these settings cannot be shared by the processes of this launch. Needs no model."""
    count = ranks()[1]
    if count == 1:
        return
    if training.batch_size % count:
        raise UsageError(
            f"train.batch_size {training.batch_size} cannot be divided by {count} processes",
            "The batch is that of all processes together: choose a multiple of their number, or start another number.",
        )
    if training.parallel == "fsdp" and training.mode == "lora":
        raise UsageError(
            "train.parallel fsdp with train.mode lora: adapters need the gradients of whole weights",
            "Use train.parallel=ddp, or train.mode=full.",
        )
    untried = [f"train.{name}" for name in ("compiled", "offload") if getattr(training, name)]
    untried += ["train.optimizer adamw-8bit"] * (training.optimizer == "adamw-8bit")
    if untried and (training.parallel == "fsdp" or training.compiled):
        raise UsageError(
            f"{untried[0]} with {count} processes{' and train.parallel fsdp' * (training.parallel == 'fsdp')}: not tried yet",
            "Leave it out, or train in one process.",
        )
    device = torch.device(training.device if training.device != "auto" else "cuda" if _gpus() else "cpu")
    if device.type == "cuda" and device.index is not None:
        raise UsageError(
            f"train.device {training.device}: {count} processes cannot share one GPU",
            "Leave it out: each takes its own.",
        )
    if device.type == "cuda" and int(os.environ.get("LOCAL_RANK", "0")) >= _gpus():
        raise UsageError(
            f"there are more processes on this machine than its {_gpus()} GPUs",
            "Give --nproc_per_node the number of GPUs, or use --device cpu.",
        )


def refuse_parted(model: nn.Module, processes: int, accumulate: int) -> None:
    """Raise UsageError where a layer of `model` needs the whole batch, and sees a part of it at a time."""
    if processes * accumulate == 1:
        return
    shared = f"each of the {processes} processes has a part"
    split = f"train.accumulate {accumulate} splits it"
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise UsageError(
                f"{name} ({type(module).__name__}) needs the whole batch, and {shared if processes > 1 else split}",
                "Put it into eval mode in a model that is in training mode (it keeps its statistics then), or leave the batch whole.",
            )


def _gpus() -> int:
    return torch.cuda.device_count()


class Ranks:
    """This process's part in a run. Alone, everything is as it is given; `sharded` says that weights are cut (FSDP2)."""

    def __init__(self, training: Training) -> None:
        check_ranks(training)
        self.team = team()
        self.sharded = self.team.size > 1 and training.parallel == "fsdp" and training.steps > 0
        self._asking: nn.Module | None = None
        self._accumulate = training.accumulate if training.steps else 1

    @property
    def key(self) -> tuple[int, ...]:
        """What the keys of this process's own randomness (dropout) end with: nothing in the first one."""
        return (self.team.rank,) if self.team.rank else ()

    def home(self, device: torch.device) -> torch.device:
        """Where a model is before it is placed: one that will be cut need not fit on a device."""
        return torch.device("cpu") if self.sharded else device

    # --- Before training. ---

    def prepared(
        self, pruner: Pruner, model: nn.Module, adapter: Adapter, batches: Batches, previous: Mapping[str, Any] | None
    ) -> tuple[Pruner, Surgery | None]:
        """`pruner` after its `prepare`, or as in the state `previous` of a run, and what it removes, also of `model` itself.

        Raises UsageError where a layer of `model` needs the whole batch, and gets parts.
        """
        refuse_parted(model, self.team.size, self._accumulate)
        found = previous
        if previous is None:
            pruner = prepared(pruner, model, adapter, batches)
            surgery, found = pruner.surgery, self.agreed(pruner, model)
        if found is not None:
            with restoring():
                kept, removed = copy.deepcopy(found["pruner"]), found.get("surgery")
            pruner = pruner.restored(kept)
            surgery = None if removed is None else Surgery.from_json(removed, "checkpoint")
        if surgery is not None:
            surgery.apply(model)
        return pruner, surgery

    def agreed(self, pruner: Pruner, model: nn.Module) -> Mapping[str, Any] | None:
        """What the first process's method has found in `prepare`, which every process has done, as in a checkpoint; None where this
        process's own holds. `model` gets the first one's weights: what was summed on several devices may be rounded differently.
        """
        if self.team.size == 1 or type(pruner).prepare is Pruner.prepare:
            return None
        found = {
            "pruner": tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), dict(pruner.state())),
            "surgery": None if pruner.surgery is None else pruner.surgery.to_json(),
        }
        found = self.team.shared(found)
        for value in model.state_dict().values():
            self.team.broadcast_(value)
        return None if self.team.leads else found

    def place(
        self, student: nn.Module, teacher: nn.Module | None, layers: list[Layer], pruner: Pruner, device: torch.device
    ) -> tuple[list[Layer], dict[str, Mask]]:
        """Put the models, in place, where they are trained: cut over the processes where the run is `sharded`.

        The layers with their weights as they are then, and where they are cut, this process's parts of the first masks, which
        were chosen before. Raises UsageError where a weight's mask cannot be chosen in parts.
        """
        if not self.sharded:
            return layers, {}
        weights = {layer.name: layer.weight.detach() for layer in layers if layer.reason is None}
        for name, weight in weights.items():
            shards.refuse_cut(pruner.pattern, name, tuple(weight.shape), self.team.size)
        masks = masks_of(pruner, weights, 0.0, {})
        for model in (student, *([] if teacher is None else [teacher])):
            shards.fully_sharded_(model, device)
        own = dict(student.named_parameters())
        parts = {
            name: Mask(shards.part_of(mask.keep, own[name]).to(device).contiguous(), mask.pattern)
            for name, mask in masks.items()
        }
        return [replace(layer, weight=own.get(layer.name, layer.weight)) for layer in layers], parts

    def check_first(self, masks: Mapping[str, Mask], before: Mapping[str, Mask]) -> None:
        """Raise CompressorError where the first masks of parts are not the parts of the first masks: the method looks at all rows."""
        for name, mask in before.items():
            if name not in masks or not torch.equal(masks[name].keep, mask.keep):
                raise CompressorError(
                    f"train.parallel fsdp: {name}: the method chooses other masks where it sees some rows of a weight",
                    "Use train.parallel=ddp, or a method whose masks look at one row at a time.",
                )

    def refuse_different(self, masks: Mapping[str, Mask], data: Any = None) -> None:
        """Raise CompressorError unless all processes have the same `masks`, and the same `data` (nested tensors).

        Parts of cut weights differ: they are compared when they are whole.
        """
        if self.team.size == 1:
            return
        if not self.sharded:
            self.team.refuse_difference("the masks", _digest({name: mask.keep for name, mask in masks.items()}))
        if data is not None:
            leaves = [plain(leaf) for leaf in tree_leaves(data) if isinstance(leaf, (Tensor, Shared))]
            self.team.refuse_difference("the batches", _digest({str(n): leaf for n, leaf in enumerate(leaves)}))

    # --- A step. ---

    def share(
        self, adapter: Adapter, inputs: Any, target: Tensor, accumulate: int
    ) -> Iterator[tuple[Any, Tensor, float, bool]]:
        """This process's share of a batch, in pieces: (inputs, target, what its mean counts in this process, whether it is the last).

        Over all processes the means count as much as samples do, since gradients are averaged.
        """
        size = self.team.size
        pieces = list(adapter.pieces(inputs, target, accumulate * size))
        if len(pieces) % size:
            raise CompressorError(
                f"a batch of {len(target)} samples cannot be shared by {size} processes",
                "Give batches whose number of samples can be divided by the number of processes.",
            )
        each = len(pieces) // size
        mine = pieces[self.team.rank * each : (self.team.rank + 1) * each]
        for number, (piece, wanted, share) in enumerate(mine, 1):
            yield piece, wanted, share, number == each

    def asked(self, student: nn.Module, adapter: Adapter, inputs: Any, last: bool) -> Tensor:
        """What `student` answers; the backward pass averages gradients over the processes, with the `last` piece of a batch."""
        if self.team.size == 1 or self.sharded:
            return adapter.predict(student, inputs)
        if self._asking is None:
            self._asking = nn.parallel.DistributedDataParallel(
                _Asking(student, adapter), find_unused_parameters=self._leaves_unused(student, adapter, inputs)
            )
        with self._asking.no_sync() if not last else nullcontext():  # type: ignore[operator]
            answer: Tensor = self._asking(inputs)
        return answer

    def _leaves_unused(self, student: nn.Module, adapter: Adapter, inputs: Any) -> bool:
        """Whether some parameter of `student` has no part in its answer to `inputs`, in any process: DDP has to be told, since it
        waits for every gradient, and looking for such parameters at every step takes time."""
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in trained]
        with repeatable("unused", gpus=True):
            adapter.predict(student, inputs).float().square().mean().backward()  # type: ignore[no-untyped-call]
        unused = any(parameter.grad is None for parameter in trained)
        for parameter, grad in zip(trained, before, strict=True):
            parameter.grad = grad
        return bool(self.team.largest(int(unused)))

    def total(self, norm: Tensor) -> Tensor:
        """A norm of all gradients as a plain tensor."""
        found: Tensor = shards.whole(norm) if self.sharded else norm
        return found

    def counted(self, entries: float) -> float:
        """What is counted of weights in this process, of all of them: where they are cut, the sum over all processes."""
        return self.team.summed(entries)[0] if self.sharded else float(entries)

    # --- Whole again. ---

    def cut(self, parts: Mapping[str, Tensor], likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The plain `parts` of this process as tensors that are cut like those of the same names in `likes`."""
        return {name: shards.cut_like(part, likes[name]) for name, part in parts.items()}

    def parts(self, wholes: Mapping[str, Any], likes: Mapping[str, Tensor]) -> dict[str, Any]:
        """The tensors `wholes`; where the model is cut, copies, cut like those in `likes` where they have their shape."""
        if not self.sharded:
            return dict(wholes)
        found = {}
        for name, value in wholes.items():
            if isinstance(value, Tensor) and value.shape == (like := likes[name]).shape:
                part = shards.part_of(value, like).to(shards.local(like).device, copy=True)
                found[name] = shards.cut_like(part, like)
            else:
                found[name] = copy.deepcopy(value)
        return found

    def agreed_masks(
        self, masks: Mapping[str, Mask], parameters: Mapping[str, Tensor], model: nn.Module
    ) -> dict[str, Mask]:
        """The finished `masks`, whole. Raises CompressorError unless all processes have the same, and the same weights in `model`."""
        if self.sharded:
            keeps = self.cut({name: mask.keep for name, mask in masks.items()}, parameters)
            masks = {name: Mask(keep, masks[name].pattern) for name, keep in self.whole(keeps, True).items()}
        if self.team.size > 1:
            self.team.refuse_difference("the masks", _digest({name: mask.keep for name, mask in masks.items()}))
            self.team.refuse_difference("the weights", _digest(model.state_dict()))
        return dict(masks)

    def whole(self, state: Mapping[str, Any], everywhere: bool = False) -> dict[str, Any]:
        """`state` with every tensor whole: in the first process, or `everywhere`. To be called by all."""
        if not self.sharded:
            return dict(state)
        found: dict[str, Any] = shards.whole(state, everywhere or self.team.leads)
        return found


class _Asking(nn.Module):
    """What an adapter asks a model, as a module: DDP averages the gradients of what is called through it."""

    def __init__(self, student: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.student = student
        self._adapter = adapter

    def forward(self, inputs: Any) -> Tensor:
        return self._adapter.predict(self.student, inputs)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(raw(tensor))
    return found.hexdigest()
