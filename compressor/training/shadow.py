"""The Shadow: masked training on optimizer step hooks.

The model always holds its true sparse weights; the dense weights live here, as fp32 masters do in mixed precision.
Before an optimizer step every gradient is replaced by the estimator's and the dense weight put back; after it the pruner
is asked for masks, and the sparse weight written. Nothing is copied for that: for the length of the step the parameter has the memory
of the dense weight, and otherwise its own. So layers stay plain `nn.Linear` and
`nn.Conv2d`: dense checkpoints load, torch.compile compiles once, export sees no extra operations, and masks are
computed once per optimizer step, not once per forward. The price is one dense copy and one bool mask in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.errors import CompressorError, UsageError
from compressor.foreign.sound import refuse_empty, refuse_quantised
from compressor.sparsity.estimator import Estimator
from compressor.sparsity.notation import parse
from compressor.sparsity.on_gpu import kernels_for
from compressor.sparsity.pattern import Mask, Pattern
from compressor.training.answers import checked_masks, copied_, gradient_of, masks_of, shrunk_by, verify, version
from compressor.training.pruner import Pruner, found_names, refuse_other, refuse_text
from compressor.training.rounding import check_quantise, rounded, sparse
from compressor.training.shards import count_like, cut_like, is_cut, local, part_of, part_of_count, refuse_unlocal

_LOOKS = 3
"""Steps before which every weight is compared with what was left in it."""


class Shadow:
    """The dense weights behind `weights` (target parameters by name), which it keeps masked while `optimizer` steps.

    `progress`, the share of the steps that is done after the next one, is the caller's to set before each step.
    Of weights that FSDP2 has cut, it holds and masks the rows of this process. `previous` are the masks to start from, if any. With
    `outside` the dense weights are in the machine's memory, wherever `weights` are.
    `flips` counts, per weight name, the entries whose mask changed in the last step; `flipped` since the start.
    Where a step of the optimizer itself raises, the weights are dense until the next one, `restore` or `close`.
    Raises CompressorError at an optimizer step with a closure, with gradients that a scaler has not unscaled, and where a weight was
    written to, cast or moved since the last step, which that step would undo; UsageError for a weight that has a Shadow already or
    two names, for a method that has to be prepared and is not, and where a mask of a weight that is cut needs the rows of other
    processes.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        pruner: Pruner,
        optimizer: Optimizer,
        progress: float = 0.0,
        previous: Mapping[str, Mask] | None = None,
        outside: bool = False,
    ) -> None:
        optimizer = _that_steps(optimizer)
        _refuse_misplaced(weights, pruner, optimizer)
        refuse_unlocal(pruner.pattern, weights)
        refuse_empty(weights)
        for name, weight in weights.items():
            refuse_quantised(name, weight)
        _refuse_shared(weights, optimizer)
        check_quantise(pruner, {name: weight.dtype for name, weight in weights.items()})
        if previous is None:
            _refuse_unprepared(pruner)
        self.pruner = pruner
        self.progress = progress
        self.dense: dict[str, Tensor] = {
            name: local(weight.detach()).to("cpu" if outside else weight.device, copy=True)
            for name, weight in weights.items()
        }
        self.masks: dict[str, Mask] = dict(previous or {})
        self.flips: dict[str, Tensor] = {}
        self._weights = dict(weights)
        self._sparse: dict[str, Tensor] = {}  # the weights' own memory, while theirs is that of the dense ones
        self._stepping = False  # true after a step that failed, too
        self._kinds = {name: (weight.dtype, weight.device) for name, weight in weights.items()}
        self._marks: dict[str, tuple[int, int]] = {}
        self._looks = 0
        trained = _groups(optimizer)
        if missing := [name for name, weight in weights.items() if id(weight) not in trained]:
            raise CompressorError(
                f"{missing[0]} is pruned but not trained by the optimizer", "Give it all the targets."
            )
        self._given: dict[str, tuple[Tensor, int]] = {}  # the estimator's gradients of this step
        self._renew_masks()
        self.flipped: dict[str, Tensor] = {name: torch.zeros_like(count) for name, count in self.flips.items()}
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The parameters that it was made for, by the names that it was given."""
        return self._weights

    def close(self) -> None:
        """Take the hooks off the optimizer; the model keeps its sparse weights.

        Warns where its masks keep more than the method's pattern does, and `progress` was never set.
        """
        loose = [m for m in self.masks.values() if m.pattern.density > self.pruner.pattern.density]
        if loose and self.progress == 0.0:
            warnings.warn(
                f"{len(loose)} weights are {loose[0].pattern}, not yet {self.pruner.pattern}: set shadow.progress before each step",
                stacklevel=2,
            )
        for handle in self._handles:
            handle.remove()
        self._give_back()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, as nested dicts of tensors."""
        own = self._weights
        masks = {n: {"keep": cut_like(m.keep, own[n]), "pattern": str(m.pattern)} for n, m in self.masks.items()}
        return {
            "dense": {name: cut_like(dense, own[name]) for name, dense in self.dense.items()},
            "masks": masks,
            "flipped": {name: count_like(count, own[name]) for name, count in self.flipped.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave, on any device, and write the sparse weights.

        Raises CompressorError where it is not of these weights, and where a mask breaks its pattern.
        """
        own = self._weights
        if other := sorted(set(state["dense"]) ^ set(own)):
            raise CompressorError(f"this state is of other weights: {other[0]}", "Restore it for those that it is of.")
        self._give_back()
        for name, weight in own.items():
            copied_(self.dense[name], part_of(state["dense"][name], weight), name)
            if not self._lends(name):
                local(weight.data).copy_(self.dense[name])
        device = {name: weight.device for name, weight in own.items()}
        masks = {
            name: Mask(
                (part_of(mask["keep"], own[name]) if name in own else mask["keep"]).to(
                    device.get(name, "cpu"), copy=True
                ),
                parse(mask["pattern"]),
            )
            for name, mask in state["masks"].items()
        }
        self.masks = checked_masks(masks, {name: self._there(name) for name in own})
        verify(self.masks)
        self.flipped = {
            n: part_of_count(count.to(device[n], copy=True), own[n]) for n, count in state["flipped"].items()
        }
        self._make_sparse({})

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in args[1:]) or kwargs.get("closure") is not None:
            raise CompressorError(
                "optimizers that call a closure cannot train masked weights",
                "A closure sees the dense weights; use AdamW, SGD or another optimizer without one.",
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise CompressorError("the gradients are still scaled", "Call scaler.unscale_(optimizer) before the step.")
        groups, estimator = _groups(optimizer), self.pruner.estimator
        if missing := [name for name, weight in self._weights.items() if id(weight) not in groups]:
            raise CompressorError(
                f"{missing[0]} is no longer trained by the optimizer",
                "close() the Shadow first, or freeze the weight instead.",
            )
        self._refuse_changed()
        self._stepping = True
        for name, weight in self._weights.items():
            mask, dense = self.masks.get(name), self.dense[name].to(weight.device)
            if mask is not None and weight.grad is not None and not self._is_given(name, weight.grad):
                up = groups[id(weight)].get("maximize", False)  # estimators are told the gradient of what is minimised
                grad = -local(weight.grad) if up else local(weight.grad)
                grad = gradient_of(estimator, name, grad, dense, mask)
                weight.grad = cut_like(-grad if up else grad, weight)
                self._given[name] = weight.grad, version(weight.grad)
            if not self._lends(name):
                local(weight.data).copy_(dense)
            elif weight.data_ptr() != dense.data_ptr():  # the same after a step that failed
                self._sparse[name], weight.data = weight.data, dense

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._stepping:
            return  # called a second time in one step: see _is_given
        self._given.clear()
        estimator, groups = self.pruner.estimator, _groups(optimizer)
        skipped = getattr(optimizer, "found_inf", None)  # of a GradScaler, where the optimizer itself is to skip a step
        for name, weight in self._weights.items():
            lends, mask = self._lends(name), self.masks.get(name)
            dense = self._there(name)
            if lends and weight.data_ptr() != dense.data_ptr():  # an optimizer that gives a parameter other memory
                dense.copy_(weight.data)
            if mask is not None and weight.grad is not None:
                shrunk = shrunk_by(estimator, name, dense, mask, float(groups[id(weight)]["lr"]))
                if shrunk is not dense and not (skipped is not None and bool(skipped)):
                    dense.copy_(shrunk)
            if lends:
                weight.data = self._sparse.pop(name)
            else:
                self.dense[name].copy_(dense)
        self._renew_masks()
        self._stepping = False
        for name, count in self.flips.items():
            self.flipped[name] += count

    def _is_given(self, name: str, grad: Tensor) -> bool:
        """Whether a gradient is what the estimator gave: where a step that failed is repeated as it was, or where the `step` of an
        optimizer's class calls that of the class below, of which torch calls the hooks, too."""
        return name in self._given and self._given[name][0] is grad and self._given[name][1] == version(grad)

    def _refuse_changed(self) -> None:
        """Raise CompressorError where a weight is not as it was left: a step would undo that, and say nothing.

        After the first steps only a weight that was written to since is compared: it may have its values again, as after a look at an
        average. Before, all are: who writes to their `data`, of which torch does not tell, does so in every step.
        """
        self._looks += 1
        for name, weight in self._weights.items():
            (dtype, device), mask = self._kinds[name], self.masks.get(name)
            if (weight.dtype, weight.device) != (dtype, device):
                raise CompressorError(
                    f"{name} is {weight.dtype} on {weight.device}, and was {dtype} on {device} when its Shadow was made",
                    "Cast and move the model before the optimizer and the Shadow are made.",
                )
            if self._stepping or (self._looks > _LOOKS and self._marks[name] == _mark(weight)):
                continue
            data, left = local(weight.data), self.dense[name].to(device)
            if mask is not None:
                left = sparse(left, mask, self.pruner)
            if not torch.allclose(data, left, rtol=0, atol=0, equal_nan=True):
                raise CompressorError(
                    f"{name} was written to since the last step, and this one would undo that",
                    "Load weights before the Shadow is made: close() it and make another. After a checkpoint, `restore` its state.",
                )

    @torch.no_grad()
    def _give_back(self) -> None:
        """Undo what a step that failed left: dense weights in the model."""
        if not self._stepping:
            return
        for name, weight in self._weights.items():
            if name in self._sparse:
                weight.data = self._sparse.pop(name)
            elif not self._lends(name):
                local(weight.data).copy_(self.dense[name])
        self._stepping = False
        self._make_sparse({})

    @torch.no_grad()
    def _renew_masks(self) -> None:
        before, there = self.masks, {name: self._there(name) for name in self._weights}
        try:
            self.masks = masks_of(self.pruner, there, self.progress, before)
        except CompressorError as error:
            if (named := _named(error, self.pruner.pattern, there)) is None:
                raise
            raise named from error
        self._make_sparse(before)

    def _lends(self, name: str) -> bool:
        """Whether a weight has the memory of its dense one while the optimizer steps, and no copy: both are whole, in one place."""
        return self.dense[name].device == self._weights[name].device and not is_cut(self._weights[name])

    def _there(self, name: str) -> Tensor:
        """The dense weight where its weight is, which has its values already where it lends it no memory."""
        return self.dense[name] if self._lends(name) else local(self._weights[name].detach())

    @torch.no_grad()
    def _make_sparse(self, before: Mapping[str, Mask]) -> None:
        """Write the masked dense weights into the model, rounded where the method quantises, and count the flips since `before`.

        Rounding has no gradient of its own: the estimator gets that of the rounded weight as it is (straight-through).
        """
        for name, weight in self._weights.items():
            self._marks[name] = _mark(weight)  # writing to `data` does not count
            mask, data, dense = self.masks.get(name), local(weight.data), self._there(name)
            if mask is None:
                data.copy_(dense)
                self.flips[name] = torch.zeros((), dtype=torch.int64, device=dense.device)
                continue
            self.flips[name] = masked_(data, dense, mask, before.get(name))
            if self.pruner.quantise != "none":
                data.copy_(rounded(data, self.pruner))


def _named(error: CompressorError, pattern: Pattern, weights: Mapping[str, Tensor]) -> CompressorError | None:
    """What `pattern` says of a weight, with the weight's name; None for an `error` of another origin."""
    if error.message.startswith(f"{pattern}: "):
        for name, weight in weights.items():
            if reason := pattern.misfit(tuple(weight.shape)):
                hint = "Leave it out: compressor.choose_layers lists the layers that the pattern fits."
                return CompressorError(f"{name}: {pattern} {reason}", hint)
            if bool(weight.isnan().any()):
                return CompressorError(f"{name} holds NaN", "Leave out steps whose loss or gradient is not finite.")
    return None


def _refuse_misplaced(weights: Any, pruner: Any, optimizer: Any) -> None:
    """Raise UsageError for what is no weights by name, no pruner or no optimizer of torch."""
    if not isinstance(weights, Mapping):
        how = "Give them by name: {name: p for name, p in model.named_parameters() if p.dim() > 1}."
        raise UsageError(f"the weights are {type(weights).__name__}", how)
    if not isinstance(pruner, Pruner):
        found = f"the class {pruner.__name__}" if isinstance(pruner, type) else type(pruner).__name__
        raise UsageError(f"the pruner is {found}", "Give an instance of a compressor.Pruner.")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise UsageError(f"the optimizer is {type(optimizer).__name__}", "Give one of torch.optim, or accelerate's.")
    refuse_text(pruner)
    refuse_other(pruner, "estimator", Estimator, pruner.estimator)
    name = type(optimizer).__name__
    if callable(getattr(optimizer, "second_step", None)):
        raise UsageError(
            f"{name} steps in two calls, of which a Shadow hears nothing", "Give the optimizer inside it to both."
        )
    if callable(getattr(optimizer, "eval", None)):
        raise UsageError(
            f"{name} writes other weights than those that it trains into the model (eval()), and they would not be sparse",
            "Use an optimizer without a schedule of its own, and compressor.Average.",
        )
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise UsageError(f"{name} has no learning rate (lr=None)", "Give it one: relative_step=False, lr=….")


def _refuse_unprepared(pruner: Pruner) -> None:
    """Raise UsageError for a method that has found nothing yet of what its `prepare` finds, and for one that removes structure."""
    name = type(pruner).__name__
    if pruner.surgery is not None or "surgery" in found_names(type(pruner)):
        raise UsageError(f"{name} removes structure, and a Shadow does not", "Use compressor.prune.")
    if pruner.unprepared:
        raise UsageError(
            f"{name} has looked at nothing yet, and a Shadow does not call its prepare()",
            "Train the result of compressor.prune(..., steps=0) with a method that looks at nothing (Magnitude() keeps its masks), or "
            "give pruner.prepare(model, adapter, batches).",
        )


def _mark(weight: Tensor) -> tuple[int, int]:
    """What changes where others write to `weight` or give it other memory."""
    return version(weight), local(weight.data).data_ptr()


def _refuse_shared(weights: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Raise UsageError where two names, or two Shadows of one optimizer, would write to one weight."""
    first: dict[int, str] = {}
    for name, weight in weights.items():
        if (known := first.setdefault(id(weight), name)) != name:
            raise UsageError(f"{known} and {name} are one parameter", "Give it once, as named_parameters() does.")
    for hook in optimizer._optimizer_step_pre_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, Shadow) and (both := [first[id(w)] for w in other.weights.values() if id(w) in first]):
            raise UsageError(f"{both[0]} has a Shadow already", "close() that one, or leave the weight out.")


def masked_(sparse: Tensor, dense: Tensor, mask: Mask, before: Mask | None) -> Tensor:
    """Write `dense` under `mask` into `sparse`; how many entries of the mask changed since `before` (none without one), as int64."""
    old = None if before is mask else before
    tensors = (dense, sparse, mask.keep, *(() if old is None else (old.keep,)))
    if kernels := kernels_for(*tensors):
        return kernels.settle_(sparse, dense, mask.keep, None if old is None else old.keep)  # type: ignore[no-any-return]
    torch.where(mask.keep, dense, dense.new_zeros(()), out=sparse)
    if old is None:
        return torch.zeros((), dtype=torch.int64, device=dense.device)
    return (old.keep ^ mask.keep).count_nonzero()


def _that_steps(optimizer: Any) -> Optimizer:
    """The optimizer that has hooks: accelerate's, of `accelerator.prepare`, is one around it."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def _groups(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The group of each trained parameter, by its id. Loading a state replaces the optimizer's groups, so they are not kept."""
    return {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
