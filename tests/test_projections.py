"""Linears that take the same tensor as one product: which are found, that the model stays the model, and what a plan says of them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from imitated import BF16, CUDA, TWO_OF_FOUR, error, sparse_, unit
from tiny_denoisers import CASES
from torch import Tensor, nn

import compressor
from compressor import NM, CompressorError, Plan
from compressor.cli.tables import plan_tables
from compressor.lower import cusparselt, forms, job, quantised
from compressor.lower.chooser import deviation, seeded
from compressor.lower.forms import dense_forms
from compressor.lower.job import built
from compressor.lower.projections import FusedProjections, joined
from compressor.lower.quantised import dense_int8
from compressor.lower.units import Found, find_units, put_unit
from compressor.report.words import layer_name

SHARED = NM(2, 4, 4)
X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))


class Attention(nn.Module):
    """Queries of x, keys and values of x or of a text; `between` is done with x after its queries."""

    def __init__(self, queries: int = 32, between: Callable[[Tensor], Any] = lambda x: None) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(32, queries), nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.back, self.between = nn.Linear(32, 32), between

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        query = self.to_q(x)
        self.between(x)
        text = x if text is None else text
        key, value = self.to_k(text), self.to_v(text)
        query, key, value = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (query, key, value))
        key, value = (y.repeat_interleave(query.shape[1] // y.shape[1], 1) for y in (key, value))
        out: Tensor = self.back(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)[..., :32])
        return out


class Gated(nn.Module):
    """A feed-forward with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attn, self.ff = Attention(**settings), Gated()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        out: Tensor = x + self.ff(x)
        return out


def made(module: nn.Module, pattern: NM | None = SHARED) -> Any:
    with torch.no_grad():
        for weight in module.parameters() if pattern is not None else ():
            if weight.dim() > 1:
                weight.copy_(pattern.mask(weight.abs()).apply(weight))
    return module.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fused(model: nn.Module, *inputs: Tensor, fuse: Any = True) -> list[Found]:
    return [one for one in find_units(model, lambda: model(*inputs), fuse)[0] if one.fused]


def with_all_fused(model: nn.Module, found: list[Found]) -> nn.Module:
    form = copy.deepcopy(model)
    for one in found:
        put_unit(form, one, copy.deepcopy(one.unit.module))
    return form.requires_grad_(False)


# --- What is found. ---


def test_query_key_and_value_are_one_unit_and_so_are_a_gate_and_what_it_gates() -> None:
    model = made(Block())
    (qkv, gated) = fused(model, X)
    assert qkv.fused == ("attn.to_q", "attn.to_k", "attn.to_v") and qkv.at == "attn.to_q"
    assert qkv.weights == ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight")
    assert list(map(str, qkv.patterns)) == ["4:2:4"] * 3 and qkv.unit.input_shape == X.shape
    assert gated.fused == ("ff.gate", "ff.up")
    units, left = find_units(model, lambda: model(X), True)
    assert [one.at for one in units] == ["attn.to_q", "attn.back", "ff.gate", "ff.down", "attn"] and not left
    whole = qkv.unit.module
    assert isinstance(whole, nn.Linear) and whole.weight.shape == (96, 32)
    assert torch.equal(whole.weight, torch.cat([model.attn.get_parameter(f"to_{p}.weight") for p in "qkv"]))
    # keys have no bias
    assert torch.equal(whole.bias[:32], model.attn.to_q.bias) and not whole.bias[32:64].any()
    assert not any(one.fused for one in find_units(model, lambda: model(X))[0])


def test_a_text_has_its_own_product() -> None:
    model = made(Attention())
    (kv,) = fused(model, X, TEXT)
    assert kv.fused == ("to_k", "to_v") and kv.unit.input_shape == TEXT.shape
    form = with_all_fused(model, [kv])
    torch.testing.assert_close(form(X, TEXT), model(X, TEXT))


def test_fewer_keys_than_queries() -> None:
    model = made(Attention(queries=64))
    (qkv,) = fused(model, X)
    form = with_all_fused(model, [qkv])
    assert form.to_q.sizes == [64, 32, 32]
    torch.testing.assert_close(form(X), model(X))


class Own(nn.Linear):
    """A layer of a class of its own."""


def twice(model: Any) -> None:
    model.between = lambda x: (model.to_k(x), "no module of the model's own")


def hooked(model: Any) -> None:
    model.to_k.register_forward_hook(lambda *_: None)


def with_one_name_more(model: Any) -> None:
    model.again = model.to_k


def of_its_own(model: Any) -> None:
    model.to_k = Own(32, 32)


def wrapped(model: Any) -> None:
    """As an adapter of peft does."""
    model.to_k = nn.Sequential(model.to_k)


def parametrized(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.to_k)


def with_a_forward_of_its_own(model: Any) -> None:
    """As some adapters set it, and as offloading does."""
    before = model.to_k.forward
    model.to_k.forward = lambda x: before(x) + 1


def without_rows(model: Any) -> None:
    model.to_k = nn.Linear(32, 0)


@pytest.mark.parametrize(
    "change", [hooked, with_one_name_more, of_its_own, parametrized, wrapped, with_a_forward_of_its_own]
)
def test_where_one_has_to_stay_the_others_are_fused(change: Callable[[Any], None]) -> None:
    model = made(Attention(), None)
    change(model)
    found = fused(model, X)
    assert [one.fused for one in found] == [("to_q", "to_v")]
    torch.testing.assert_close(with_all_fused(model, found)(X), model(X))


def test_what_is_called_twice_on_one_tensor_stays() -> None:
    model = made(Attention(), None)
    twice(model)
    assert fused(model, X) == []


class Sum(nn.Module):
    """A layer without rows beside others, and one that is called by the argument's name after it was called by place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.none, self.named = (nn.Linear(32, 32) for _ in range(4))
        self.none.weight, self.none.bias = nn.Parameter(torch.empty(0, 32)), nn.Parameter(torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(x) + self.two(x) + self.named(x) + self.none(x).sum()
        return out + self.named(input=x)


def test_layers_without_rows_or_called_by_name_stay() -> None:
    model = made(Sum(), None)
    assert [one.fused for one in fused(model, X)] == [("one", "two")]
    form: Any = with_all_fused(model, fused(model, X))
    torch.testing.assert_close(form(X), model(X))
    for name in ("one", "two"):
        torch.testing.assert_close(form.get_submodule(name)(input=X), model.get_submodule(name)(X))


def test_a_layer_whose_forward_is_its_own_is_not_lowered_at_all() -> None:
    model = made(Attention(), None)
    with_a_forward_of_its_own(model)
    lowered = compressor.lower(model, X, cache=False)
    assert lowered.plan.left_out == {"to_k.weight": "it has forward hooks, or another forward, which would be lost"}
    torch.testing.assert_close(lowered.model(X), model(X))


def test_a_tensor_that_is_written_to_is_another() -> None:
    model = made(Attention(between=lambda x: x.mul_(2)), None)
    assert [one.fused for one in fused(model, X.clone())] == [("to_k", "to_v")]


def test_different_patterns_stay_apart() -> None:
    model = made(Attention(), None)
    assert [one.fused for one in fused(model, X)] == [("to_q", "to_k", "to_v")]  # none is one pattern, too
    made(model.to_q, NM(2, 4))
    assert [one.fused for one in fused(model, X)] == [("to_k", "to_v")]
    made(model.to_k, NM(1, 4))
    made(model.to_v, NM(2, 4))
    (qv,) = fused(model, X)
    assert qv.fused == ("to_q", "to_v") and list(map(str, qv.patterns)) == ["2:4"] * 2
    torch.testing.assert_close(with_all_fused(model, [qv])(X), model(X))
    made(model.to_q, NM(1, 4, 4))
    assert fused(model, X) == []
    # a plan may say so all the same: it is of other weights
    assert [one.fused for one in fused(model, X, fuse=[("to_q", "to_k", "to_v")])] == [("to_q", "to_k", "to_v")]


def test_weights_of_different_dtypes_stay_apart() -> None:
    """As autocast lets them be."""
    model = made(Attention(), None)
    model.to_v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert [one.fused for one in fused(model, X)] == [("to_q", "to_k")]


class Twin(nn.Module):
    """One block, called twice; and a layer of its own that is called on two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.one, self.two = Attention(), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        y = self.block(x)
        out: Tensor = self.one(x) + self.two(x) + self.one(y)
        return out


def test_a_module_that_is_called_twice_and_a_layer_that_is_called_elsewhere_too() -> None:
    model = made(Twin())
    found = fused(model, X)
    assert [one.fused for one in found] == [("block.to_q", "block.to_k", "block.to_v")]
    torch.testing.assert_close(with_all_fused(model, found)(X), model(X))


# --- The model stays the model. ---


def test_other_sizes_inference_mode_copies_and_state() -> None:
    model = made(Block())
    form = with_all_fused(model, fused(model, X))
    for x in (X, X[:1], X.repeat(3, 1, 1), X[:0]):
        torch.testing.assert_close(form(x), model(x))
    with torch.inference_mode():
        torch.testing.assert_close(form(X), model(X))
    copied: Any = copy.deepcopy(form)
    form.attn.to_q.product.weight.zero_()
    torch.testing.assert_close(copied(X), model(X))
    assert copied.attn.to_q is copied.attn.to_k._first[0] is copied.attn.to_v._first[0]
    names = [name for name, one in copied.named_parameters() if name.startswith("attn.to") and one.numel()]
    assert names == ["attn.to_q.product.weight", "attn.to_q.product.bias"]
    torch.testing.assert_close(copied.double()(X.double()), model.double()(X.double()))


def parts(*sizes: int) -> tuple[list[nn.Linear], list[nn.Module]]:
    layers = [nn.Linear(32, size) for size in sizes]
    first = FusedProjections(joined(layers), sizes, X.shape[:-1])
    return layers, [first, *first.others()]


def test_it_multiplies_once_and_keeps_nothing_after_the_last_part() -> None:
    layers, made = parts(8, 16, 24)
    calls = []
    first: Any = made[0]
    first.product.register_forward_hook(lambda *_: calls.append(1))
    for turn in (1, 2):
        for layer, part in zip(layers, made, strict=True):
            torch.testing.assert_close(part(X), layer(X))
        assert len(calls) == turn and first._made is None
    assert first.extra_repr() == "sizes=[8, 16, 24]" and made[2].extra_repr() == "place=2"


@pytest.mark.parametrize("inference", [False, True])
def test_calls_in_another_order_on_other_tensors_or_on_changed_ones_are_right(inference: bool) -> None:
    layers, made = parts(8, 16, 24)
    with torch.inference_mode(inference):
        first, second = X.clone(), TEXT.clone()
        calls = [(2, first), (0, second), (1, first), (1, second), (0, first), (0, first), (2, first), (1, first)]
        for place, x in calls:
            torch.testing.assert_close(made[place](x), layers[place](x))
        # every part was given, so that the next call multiplies
        first.add_(1)
        for place in (0, 1, 2):
            torch.testing.assert_close(made[place](first), layers[place](first))


def test_a_tensor_that_was_written_to_since_is_multiplied_anew() -> None:
    layers, made = parts(8, 16)
    x = X.clone()
    made[0](x)
    x.add_(1)
    torch.testing.assert_close(made[1](x), layers[1](x))


def test_parts_are_exported_for_any_number_of_rows() -> None:
    layers, made = parts(8, 16)

    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([part(x) for part in made], -1)

    exported = torch.export.export(Both(), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for x in (X, torch.randn(len(X) + 3, *X.shape[1:])):
        torch.testing.assert_close(exported(x), torch.cat([layer(x) for layer in layers], -1))


def test_a_copy_between_two_parts_has_nothing_of_the_first() -> None:
    layers, made = parts(8, 16)
    with torch.enable_grad():
        made[0](X.clone().requires_grad_())
    copied: Any = copy.deepcopy(nn.ModuleList(made))
    assert copied[0]._made is None and made[0]._made is not None
    torch.testing.assert_close(copied[1](X), layers[1](X))


def test_the_first_multiplies_whatever_was_left() -> None:
    """A buffer that is filled anew has the same tensor, and in inference mode no count of it."""
    layers, made = parts(8, 16, 24)
    with torch.inference_mode():
        x = X.clone()
        made[1](x), made[2](x)
        x.add_(1)
        torch.testing.assert_close(made[0](x), layers[0](x))
        x.add_(1)
        torch.testing.assert_close(made[0](x), layers[0](x))


def test_how_a_call_is_made_is_looked_at() -> None:
    _, made = parts(8, 16)
    x = X.clone().requires_grad_()
    with torch.no_grad():
        made[0](x)
    with torch.enable_grad():
        assert made[1](x).requires_grad
    made[0](x)
    with torch.autocast("cpu", torch.bfloat16):
        assert made[1](x).dtype == torch.bfloat16
    with torch.inference_mode():
        made[0](x)
    assert not made[1](x).is_inference()


def test_shapes_are_known_without_numbers() -> None:
    """On the device without any, which has no autocast."""
    _, made = parts(8, 16)
    for part, size in zip(made, (8, 16), strict=True):
        assert part.to("meta")(X.to("meta")).shape == (2, 5, size)


def test_nothing_is_kept_of_what_comes_otherwise() -> None:
    _, made = parts(8, 16, 24)
    first: Any = made[0]
    made[2](X)
    assert first._made is None
    made[0](X)
    made[1](TEXT)
    assert first._made is None


def test_parts_of_other_sizes_lie_in_memory_of_their_own() -> None:
    """A view of one row, which the model can take of any, is no view of two."""
    layers, made = parts(8, 16)
    assert not made[0](X).is_contiguous() and made[0](X[:1]).is_contiguous()
    torch.testing.assert_close(made[1](X[:1]).view(-1), layers[1](X[:1]).view(-1))


def test_threads_do_not_get_each_others_parts() -> None:
    layers, made = parts(8, 16, 24)
    wrong: list[float] = []

    @torch.no_grad()
    def work(seed: int) -> None:
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
        wanted = [layer(x) for layer in layers]
        for _ in range(200):
            for part, expected in zip(made, wanted, strict=True):
                wrong.append(float((part(x) - expected).abs().max()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 4 * 200 * 3 and max(wrong) < 1e-5


def test_it_is_one_graph_with_one_product() -> None:
    model = made(Block())
    form = with_all_fused(model, fused(model, X))
    products = []

    def count(graph: Any, inputs: Any) -> Any:
        products.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph.forward

    compiled: Any = torch.compile(form, fullgraph=True, backend=count)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(X), model(X))
    assert products == [4]  # of six Linears in the attention and in the feed-forward, and one each after them
    assert all(m._made is None for m in form.modules() if isinstance(m, FusedProjections))
    torch.compiler.reset()


def first_call(case: Any) -> tuple[Any, Any, Any]:
    """The denoiser of a pipeline, and what its pipeline calls it with first."""
    pipeline, part, seen = case.pipeline, getattr(case.pipeline, case.part), []
    pipeline.set_progress_bar_config(disable=True)

    class Seen(Exception):
        pass

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise Seen

    handle = part.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(Seen), torch.no_grad():
        pipeline(num_inference_steps=2, **case.call)
    handle.remove()
    return part.eval(), *seen[0]


@pytest.mark.parametrize("name", CASES)
def test_models_of_diffusers_stay_what_they_are(name: str) -> None:
    """Every class whose pipelines are known: all that can be fused is, and the output is the same up to rounding."""
    model, args, kwargs = first_call(CASES[name]())
    with torch.no_grad():
        for parameter in model.parameters():  # tables of modulation begin as zeros
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    forward = lambda module: module(*args, **kwargs)  # noqa: E731 - what `Job.forward` is
    found = [one for one in find_units(model, partial(forward, model), True)[0] if one.fused]
    assert any("to_k" in path or "key" in path for one in found for path in one.fused), [one.fused for one in found]
    with torch.no_grad():
        off = deviation(seeded(forward, with_all_fused(model, found)), seeded(forward, model))
    assert off < 1e-5


# --- A lowering with them. ---


def test_by_default_they_are_fused_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Block())
    assert compressor.lower(model, X, cache=False).plan.fused == ()
    assert not any(one.fused for one in job.prepared(model, X, "eager", None, None, fuse=None).found)
    monkeypatch.setattr(job, "_device", lambda *_: CUDA)
    monkeypatch.setattr(job, "_setting", lambda device: None)
    assert any(one.fused for one in job.prepared(model, X, "eager", None, None, fuse=None).found)
    for fuse in (False, ()):  # as asked for, and of a plan without
        assert not any(one.fused for one in job.prepared(model, X, "eager", None, None, fuse=fuse).found)


def test_a_plan_names_them_and_is_applied_to_other_weights(tmp_path: Path) -> None:
    model = made(Block())
    lowered = compressor.lower(model, X, cache=False, fuse_projections=True)
    assert lowered.plan.fused == (("attn.to_q", "attn.to_k", "attn.to_v"), ("ff.gate", "ff.up"))
    layer = lowered.plan.layers[0]
    assert layer.shapes == ((10, 96, 32),) and layer.patterns == ("4:2:4",) * 3 and len(layer.weights) == 3
    lowered.plan.save(tmp_path / "lowering.json")
    plan = Plan.read(tmp_path)
    assert plan == lowered.plan
    for choice in ("dense", "eager"):
        form = compressor.lower(model, X, plan=plan.model_copy(update={"choice": choice})).model
        assert isinstance(form.attn.to_q, FusedProjections) == (choice == "dense")
        torch.testing.assert_close(form(X), model(X))
    # weights before pruning have no pattern, and the same layers
    before = made(Block(), None)
    for model in dense_forms(before, X, plan).values():
        torch.testing.assert_close(model(X), before(X))
    with pytest.raises(CompressorError, match=r"does not fit attn.to_q: it was \('4:2:4', '4:2:4', '4:2:4'\)"):
        compressor.lower(before, X, plan=plan)

    class Apart(Block):
        """As it is, but for a tensor of its own for the keys."""

        def __init__(self) -> None:
            super().__init__()
            self.attn.to_k.register_forward_hook(lambda *_: None)

    with pytest.raises(CompressorError, match="the plan is for another model: attn"):
        compressor.lower(made(Apart()), X, plan=plan)


@pytest.mark.parametrize("fuse", [False, True])
def test_the_dense_form_with_them_is_compiled_too(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them it is the model as it is, whose layers have no other dense form here."""
    monkeypatch.setattr(forms, "_compiled", lambda form, device: form)
    lowered = compressor.lower(made(Block(), None), X, "eager", compiled=True, cache=False, fuse_projections=fuse)
    assert ("dense, compiled" in [form.name for form in lowered.plan.forms]) == fuse


def test_what_is_skipped_is_told_of_each_weight() -> None:
    model = made(Block())
    lowered = compressor.lower(model, X, cache=False, fuse_projections=True)
    layers = [one.model_copy(update={"skips_zeros": True, "choice": "gathered"}) for one in lowered.plan.layers]
    plan = lowered.plan.model_copy(update={"layers": tuple(layers), "choice": "lowered"})
    assert plan.skipping() >= {"attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight", "ff.gate.weight"}


class Contiguous(Attention):
    """It wants its queries to lie as one Linear makes them."""

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        query = self.to_q(x)
        assert query.is_contiguous(), "queries lie apart"
        out: Tensor = self.back(query * self.to_k(x) + self.to_v(x))
        return out


class Looking(Attention):
    """Keys are made by the weight, not by the layer, where there is one."""

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        out: Tensor = super().forward(x, text)
        return out + self.to_q.weight.mean() if isinstance(self.to_q, nn.Linear) else 2 * out


class Changing(nn.Module):
    """What torch does not count as written: through `data`, or by another library's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(between=lambda x: x.data.mul_(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x * 1)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Contiguous(), "AssertionError: queries lie apart"),
        (Looking(), "the output differs by"),
        (Changing(), "the output differs by"),
    ],
)
def test_what_cannot_do_with_it_stays_apart_and_the_plan_says_why(
    model: nn.Module, why: str, dtype: torch.dtype
) -> None:
    both = nn.Sequential(made(copy.deepcopy(model)), Attention()).to(dtype).eval()
    lowered = compressor.lower(both, X.to(dtype), "eager", cache=False, fuse_projections=True)
    assert lowered.plan.fused == (("1.to_q", "1.to_k", "1.to_v"),)
    (note,) = (note for note in lowered.plan.notes if "stay apart" in note)
    assert note.startswith("0.") and "to_q, " in note and why in note and "more" not in note
    torch.testing.assert_close(lowered.model(X.to(dtype)), both(X.to(dtype)), rtol=0.02, atol=0.02)


def test_a_note_tells_a_reason_once() -> None:
    model = nn.Sequential(Contiguous(), Contiguous(), Attention()).eval()
    lowered = compressor.lower(model, X, "eager", cache=False, fuse_projections=True)
    (note,) = (note for note in lowered.plan.notes if "stay apart" in note)
    assert note == (
        "0.to_q, 0.to_k, 0.to_v, and 1 group more, take the same tensor and stay apart: AssertionError: queries lie apart"
    )


def test_they_are_told_by_name() -> None:
    lowered = compressor.lower(made(Block()), X, "eager", cache=False, fuse_projections=True)
    table = plan_tables(lowered.plan)[0]
    assert next(iter(table.columns[0].cells)) == "attn.to_q + to_k + to_v"
    assert next(iter(table.columns[4].cells)).startswith("eager ")  # of backends that were timed alone
    assert layer_name("", ()) == "the whole model" and layer_name("a.b", ()) == "a.b"
    assert layer_name("a.q", ("a.q", "b.k", "v")) == "a.q + b.k + v"


def test_the_fused_product_is_one_call_of_the_library(library: Any) -> None:
    layers: Any = [sparse_(nn.Linear(64, 32), TWO_OF_FOUR).to(BF16) for _ in range(3)]
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).to(BF16)
    made = cusparselt.CuSparseLt().build(unit(joined(layers), (16, 64)))
    first = FusedProjections(made, [32] * 3, (16,))
    library.calls.clear()
    for layer, part in zip(layers, [first, *first.others()], strict=True):
        assert error(part(x), layer(x)) < 1e-2
    assert len(library.calls) == 1


def test_inputs_come_to_8_bits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    real = quantised.gelu_quantised
    monkeypatch.setattr(quantised, "gelu_quantised", lambda *given: (count.append(1), real(*given))[1])
    layers: Any = [nn.Linear(64, 32).to(BF16) for _ in range(3)]
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).to(BF16)
    made = dense_int8().build(unit(joined(layers), (16, 64), None))
    first = FusedProjections(made, [32] * 3, (16,))
    for layer, part in zip(layers, [first, *first.others()], strict=True):
        assert error(part(x), layer(x)) < 2e-2
    assert len(count) == 1


def test_a_form_holds_its_own_copy() -> None:
    """Parameters of the given model may go on being trained."""
    model = made(Block())
    prepared = job.prepared(model, X, "eager", None, None, fuse=True)
    form = built(prepared, {})
    with torch.no_grad():
        wanted = model(X)
        model.attn.to_q.weight.zero_()
        torch.testing.assert_close(form(X), wanted)
