"""Fine-tuning: `steps` yields one record per optimizer step; `prune` drives it to its end. Nothing here prints."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.adapter import Adapter, checked_answer, cloned, to_device, with_rules
from compressor.data.batches import Batches, as_batches
from compressor.discovery import no_exit
from compressor.environment import resolve_device
from compressor.errors import CompressorError
from compressor.foreign.kept import Kept, Resting
from compressor.seeds import repeatable
from compressor.sparsity.layers import Layer
from compressor.sparsity.pattern import Mask
from compressor.sparsity.surgery import Surgery
from compressor.training.answers import copied_, masks_of, restoring, same_run, verify
from compressor.training.arithmetic import autocast, compiled_, restore_optimizer, undisturbed
from compressor.training.feed import Feed
from compressor.training.given import Asked, Given, check_result, no_number, refuse_skipped, student_of, teacher_of
from compressor.training.lora import Adapters
from compressor.training.optimizers import average_, dense_gradients, optimizer_of, revived, set_lr, stored
from compressor.training.pruner import Pruner, refuse_misplaced, warn_of_idle
from compressor.training.pruner import choose_layers as choose_layers  # noqa: PLC0414  # others look for both here
from compressor.training.pruner import chosen as chosen  # noqa: PLC0414
from compressor.training.ranks import Ranks
from compressor.training.rounding import check_quantise, sparse
from compressor.training.settings import Training
from compressor.training.shadow import Shadow
from compressor.training.shards import local, part_of
from compressor.validation import validated
from compressor.weights import bare

_TOLERATED_NONFINITE = 2
LEFT_DENSE = "left dense by the method"


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. `flip_rate` is the share of target entries whose mask changed."""

    step: int
    steps: int
    loss: float
    noise_loss: float
    teacher_loss: float | None
    lr: float
    grad_norm: float
    flip_rate: float


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned model (in eval mode, on the CPU or the device it was trained on) and what was done to it.

    `masks` by parameter name; `layers` lists every layer, with the reason where it has no mask; `flipped` is, per weight, the
    number of mask changes per entry over the whole run. `surgery` is what was removed of the model's structure.
    """

    model: nn.Module
    masks: Mapping[str, Mask]
    layers: Sequence[Layer]
    steps: Sequence[Step]
    flipped: Mapping[str, float]
    surgery: Surgery | None = None

    def __repr__(self) -> str:
        name, removed = type(self.model).__name__, ", structure removed" * (self.surgery is not None)
        return (
            f"Result({name}, {len(self.masks)} of {len(self.layers)} layers masked{removed}, {len(self.steps)} steps)"
        )


class FineTuning:
    """The state of a fine-tuning run. `steps` advances it, `state` carries it over an interruption.

    `model` is left as it is, and to be left so: the student is a copy, the teacher may share its memory. `previous` is what
    `state` gave in an interrupted run; with it, `prepare` is not called again, and CompressorError says what is not as it was.
    """

    @no_exit("training")
    @undisturbed()
    def __init__(
        self,
        model: nn.Module,
        pruner: Pruner,
        *,
        adapter: Adapter,
        data: Any,
        training: Training,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
        previous: Mapping[str, Any] | None = None,
    ) -> None:
        refuse_misplaced(model, pruner, adapter)
        self.ranks = Ranks(training)
        self.given = Given.of(model := bare(model))
        self.adapter, self.training = adapter, training
        self.device = resolve_device(training.device)
        self.batches: Batches = as_batches(data, training.batch_size, training.seed)
        self._of = same_run(previous, pruner, training, self.batches.mark())
        self._source = model
        self.student = student_of(model, training.steps, training.gradient_checkpointing).to(
            self.ranks.home(self.device)
        )
        self.teacher = None
        if pruner.objective.teacher > 0 and training.steps > 0 and not adapter.answered:
            self.teacher = teacher_of(model, self.ranks.home(self.device))
            self._asked_teacher = Resting(self.teacher)
        rules = with_rules(adapter, targets, ignore)
        masked = chosen(self.student, pruner, rules)
        check_quantise(pruner, {layer.name: self.given.dtypes[layer.name] for layer in masked}, training.mode)
        with repeatable(training.seed, "prepare"):
            pruner, self.surgery = self.ranks.prepared(pruner, self.student, rules, self.batches, previous)
        self.pruner = pruner
        layers = choose_layers(self.student, pruner, rules)
        self.layers, first = self.ranks.place(self.student, self.teacher, layers, pruner, self.device)
        self.parameters = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise CompressorError("no parameter of the model is trainable", "Call requires_grad_(True) on some.")
        with repeatable(training.seed, "masks", gpus=True):
            self.shadow = self._sparse(first)
        verify(self.shadow.masks)
        self.ranks.check_first(self.shadow.masks, first)
        place = "cpu" if "ema" in training.offload else self.device
        dense = self._dense().items() if training.ema else ()
        self.average = {name: value.to(place, copy=True) for name, value in dense}
        self.feed = Feed(adapter, self.batches, training, self.device)
        self.done = self._nonfinite = 0
        self._seen, self._kept = Asked(), Kept(self.student)
        if previous is not None:
            self._restore(previous)
        if training.compiled and training.steps:  # last: before, methods look into the layers
            compiled_(self.device, self.student, self.teacher)

    def _sparse(self, first: Mapping[str, Mask]) -> Shadow | Adapters:
        """What keeps the weights sparse while `self.optimizer`, made here, trains them, or adapters of them alone."""
        weights = {layer.name: self.parameters[layer.name] for layer in self.layers if layer.reason is None}
        lora, progress = self.training.mode == "lora", 0.0 if self.training.steps else 1.0
        if not lora:
            matrices = [layer.weight for layer in self.layers]
            self.optimizer = optimizer_of(self.training, self.parameters.values(), self.device, matrices)
            return Shadow(weights, self.pruner, self.optimizer, progress, first, "shadow" in self.training.offload)
        started = {name: weight.detach() for name, weight in weights.items()}
        masks = masks_of(self.pruner, started, 1.0, {})
        for name, mask in masks.items():
            weights[name].data.copy_(mask.apply(started[name]))
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in masks)
        adapters = Adapters(weights, masks, self.training.lora, self.training.seed)
        self.optimizer = optimizer_of(self.training, adapters.matrices.values(), self.device)
        adapters.attach(self.optimizer)
        return adapters

    def _masks(self, dense: Mapping[str, Tensor], previous: Mapping[str, Mask]) -> dict[str, Mask]:
        """The masks of the finished weights, which are `dense` before them."""
        if isinstance(self.shadow, Adapters):
            return self.shadow.masks
        with repeatable(self.training.seed, "masks", gpus=True):
            return masks_of(self.pruner, dense, 1.0, previous)

    @no_exit("training")
    @undisturbed()
    def state(self, whole: bool = True) -> dict[str, Any]:
        """Everything that the next step depends on, as nested dicts of tensors, numbers and strings. Of several processes, all
        call it, and the first has it `whole`, for any number of them.

        The tensors are the run's own and change with the next step: save or copy them first.
        """
        check_result(self.student, self.adapter, self._seen, self.done)
        verify(self.shadow.masks)
        self.ranks.refuse_different(self.shadow.masks)
        state = {
            "step": self.done,
            "model": self.student.state_dict(),
            "shadow": self.shadow.state(),
            "average": self.ranks.cut(self.average, self.parameters),
            "optimizer": stored(self.optimizer.state_dict()),
            "pruner": dict(self.pruner.state()),
            "surgery": None if self.surgery is None else self.surgery.to_json(),
            "nonfinite": self._nonfinite,
            "scale": self._seen.scale,
            "of": self._of,
            "kept": self._kept.values(self.student),
        }
        return self.ranks.whole(state) if whole else state

    @no_exit("training")
    @undisturbed()
    @torch.no_grad()
    def one_shot(self) -> Result:
        """What the method gives without fine-tuning: a model of its own. To be asked for before the first step."""
        if self.done:
            raise ValueError(f"{self.done} steps are done")
        dense = self.ranks.whole(self.ranks.cut(self.shadow.dense, self.parameters), everywhere=True)
        dense = {name: value.to(self.ranks.home(self.device)) for name, value in dense.items()}
        masks = self._masks(dense, {})
        verify(masks)
        model = self._plain().eval()
        own = dict(model.named_parameters())
        for name, weight in dense.items():
            own[name].copy_(sparse(weight, masks[name], self.pruner) if name in masks else weight)
        return Result(
            self.given.returned(model), masks, self._layers(masks, model), (), dict.fromkeys(dense, 0.0), self.surgery
        )

    def _plain(self) -> nn.Module:
        """A copy of the student that is nobody else's, and whole."""
        if not self.ranks.sharded:
            return copy.deepcopy(self.student)
        model = student_of(self._source, self.training.steps)
        if self.surgery is not None:
            self.surgery.apply(model)
        model.load_state_dict(self.ranks.whole(self.student.state_dict(), everywhere=True))
        return model

    def _layers(self, masks: Mapping[str, Mask], model: nn.Module) -> list[Layer]:
        """Every layer with its weight in `model`, and the reason where it has none of `masks`."""
        own = dict(model.named_parameters())
        every = [replace(layer, weight=own.get(layer.name, layer.weight)) for layer in self.layers]
        return [
            replace(layer, reason=LEFT_DENSE) if layer.reason is None and layer.name not in masks else layer
            for layer in every
        ]

    @restoring()
    def _restore(self, state: Mapping[str, Any]) -> None:
        if not self.ranks.sharded:  # else each process copies its parts, and reads no more of a file
            state = {**state, "optimizer": copy.deepcopy(state["optimizer"])}  # it takes tensors as they are
        self.student.load_state_dict(self.ranks.parts(state["model"], self.student.state_dict()))
        optimizer, trained = revived(state["optimizer"]), [p for g in self.optimizer.param_groups for p in g["params"]]
        moments = {int(index): value for index, value in optimizer["state"].items()}
        moments = {n: self.ranks.parts(value, dict.fromkeys(value, trained[n])) for n, value in moments.items()}
        restore_optimizer(self.optimizer, {**optimizer, "state": moments})
        self.shadow.restore(state["shadow"])
        for name, value in self.average.items():
            copied_(value, part_of(state["average"][name], self.parameters[name]), name)
        self.done, self._nonfinite = int(state["step"]), int(state["nonfinite"])
        self._seen.scale = float(state.get("scale", 0.0))  # checkpoints of earlier versions have none, nor what is kept
        self._kept.take(self.student, state.get("kept", {}))

    @no_exit("training")
    @undisturbed()
    def advance(self) -> Step:
        """One optimizer step. Raises CompressorError where none is left, and after a few that were not finite."""
        t, settings = self.done, self.training
        lr = settings.lr_at(t)
        set_lr(self.optimizer, lr)
        for parameter in self.parameters.values():
            parameter.grad = None
        inputs, target = self.feed.at(t)
        # dropout and the like draw from the global generators: give them the step's own seed, and the user's back
        with repeatable(settings.seed, "model", t, *self.ranks.key, gpus=True):
            noise_loss, teacher_loss, asked = self._backward(inputs, target)
        self.feed.ahead(t + 1)
        # no name for the gradients: it would keep all of them in memory while estimators give new ones
        trained = self.shadow.take_gradients() if isinstance(self.shadow, Adapters) else [*self.parameters.values()]
        norm = nn.utils.get_total_norm(dense_gradients(trained))
        objective = self.pruner.objective
        answered = noise_loss if self.adapter.answered else teacher_loss or 0.0
        loss = objective.noise * noise_loss + objective.teacher * answered
        grad_norm = float(self.ranks.total(norm))
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._nonfinite = 0
            self._seen.note(*asked, noise_loss)
            if settings.clip:
                nn.utils.clip_grads_with_norm_(trained, settings.clip, norm)
            self.shadow.progress = (t + 1) / settings.steps
            with repeatable(settings.seed, "step", t, gpus=self.device.type == "cuda"):
                self.optimizer.step()
            self._update_average(t)
            counts = [*self.shadow.flips.values()]  # one transfer for all: each waits for the GPU
            flips = self.ranks.counted(float(torch.stack(counts).sum()) if counts else 0.0)
        else:
            self._nonfinite += 1
            if self._nonfinite > _TOLERATED_NONFINITE:
                raise no_number(t + 1, loss, self.parameters, self._nonfinite)
            flips = 0.0
        self.done = t + 1
        entries = sum(self.parameters[name].numel() for name in self.shadow.dense)
        return Step(self.done, settings.steps, loss, noise_loss, teacher_loss, lr, grad_norm, flips / max(1, entries))

    @no_exit("training")
    @undisturbed()
    def finish(self) -> Result:
        """Write the averaged weights, masked once, into the student, and give the result. The run is over then.

        Raises CompressorError where the last steps were skipped because they were not finite, and where a weight of the result is not.
        """
        refuse_skipped(self._nonfinite, self.done)
        self.feed.over = True
        self.shadow.close()
        final = self.average if self.done and self.training.ema else self._dense()
        dense = {name: final[name].to(self.device) for name in self.shadow.dense}
        masks = self._masks(dense, dict(self.shadow.masks)) if self.done else self.shadow.masks
        verify(masks, self.pruner.pattern)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                value = sparse(dense[name], masks[name], self.pruner) if name in masks else final[name]
                local(parameter.data).copy_(value)
                parameter.grad = None
        check_result(self.student, self.adapter, self._seen, self.done)
        flipped = {
            name: self.ranks.counted(float(count)) / self.parameters[name].numel()
            for name, count in self.shadow.flipped.items()
        }
        model = self._plain() if self.ranks.sharded else self.student
        masks = self.ranks.agreed_masks(masks, self.parameters, model)
        return Result(self.given.returned(model), masks, self._layers(masks, model), (), flipped, self.surgery)

    def _backward(self, inputs: Any, target: Tensor) -> tuple[float, float | None, tuple[Any, Tensor]]:
        """Gradients of the objective on noised `inputs`; returns its two losses, without their weights, and a part of the inputs with
        what was to be answered.

        Noise was drawn for the whole batch before it is split, so that `accumulate` does not change the numbers.
        """
        if self._seen.wanted is None:
            self.ranks.refuse_different(self.shadow.masks, (inputs, target))
        objective = self.pruner.objective
        noise = objective.noise + (objective.teacher if self.adapter.answered else 0.0)
        noise_sum = teacher_sum = 0.0
        for piece, wanted, share, last in self.ranks.share(self.adapter, inputs, target, self.training.accumulate):
            piece = to_device(piece, self.device)
            with autocast(self.training, self.device):
                prediction = checked_answer(
                    self.adapter, self.ranks.asked(self.student, self.adapter, cloned(piece), last), wanted
                ).float()
                noise_loss = F.mse_loss(prediction, to_device(wanted, self.device).float())
                loss = noise * noise_loss
                if self.teacher is not None:
                    with torch.no_grad():
                        answer = self.adapter.predict(self.teacher, cloned(piece))
                    self._asked_teacher.called()
                    expected = checked_answer(self.adapter, answer, wanted).float()
                    teacher_loss = F.mse_loss(prediction, expected)
                    loss = loss + objective.teacher * teacher_loss
                    teacher_sum += share * float(teacher_loss.detach())
            noise_sum += share * float(noise_loss.detach())
            (loss * (share * self.ranks.team.size)).backward()  # type: ignore[no-untyped-call]
        noise_sum, teacher_sum = self.ranks.team.summed(noise_sum, teacher_sum)
        return noise_sum, teacher_sum if self.teacher is not None else None, (piece, wanted)

    def _dense(self) -> dict[str, Tensor]:
        """The dense value of every trained parameter: the Shadow's where it has one."""
        return {name: self.shadow.dense.get(name, local(p.detach())) for name, p in self.parameters.items()}

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        if self.training.ema:
            average_(self.average, self._dense(), 1 - self.training.ema_at(step))


def steps(run: FineTuning) -> Iterator[Step]:
    """Advance `run` to its last step, one record at a time. The caller may stop between any two."""
    while run.done < run.training.steps:
        yield run.advance()


def prune(
    model: nn.Module,
    pruner: Pruner,
    *,
    adapter: Adapter,
    data: Any,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    **training: Any,
) -> Result:
    """Prune a copy of `model` with `pruner` and fine-tune it. `model` stays as it is.

    `data`: a SampleSet (from `read_data`), Samples, a tensor of samples, a map-style dataset, or ready batches (a list,
    a DataLoader, any iterable), whose size is their own.
    `targets`, `ignore`: rules for layer names (`compressor.sparsity.layers`); None takes the adapter's. `training`: the fields
    of `Training`, above all `steps`, `batch_size`, `lr`, `seed`, `device`; `steps=0` is one-shot pruning.

    Raises CompressorError: for settings that are not valid, a pattern that fits no layer, masks that break their
    pattern, and losses that stop being finite. Warns of a rule of `ignore` that matches no layer.
    """
    refuse_misplaced(model, pruner, adapter)
    warn_of_idle(model, ignore)
    run = FineTuning(
        model,
        pruner,
        adapter=adapter,
        data=data,
        training=validated(Training, training, "prune()"),
        targets=targets,
        ignore=ignore,
    )
    records = list(steps(run))
    result = run.finish()
    return replace(result, steps=records)
