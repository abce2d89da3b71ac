"""Attention by the compiled kernels: against float64, in every layout, and where a model calls it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import compressor
from compressor.lower.attention import LARGEST_CHANNELS, FusedAttention, SelfAttention, VNMAttentionInt8, attach, fits
from compressor.lower.backend import Unit
from compressor.lower.plan import Plan
from compressor.lower.vnm_kernels import VNNI, kernels
from compressor.lower.vnm_operators import attention
from compressor.lower.vnm_weight import Lanes

extension, _why = kernels()
if extension is None:
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)
LOST = {Lanes.FLOATS: 2e-6, Lanes.CODES: 3e-3, Lanes.BYTES: 2e-2}
"""What float32 loses, codes of 12 bits and more, and those of 8."""
ALL = pytest.mark.parametrize("lanes", LOST, ids=lambda lanes: lanes.name.lower())


def runs(lanes: Lanes) -> bool:
    return lanes != Lanes.BYTES or extension.level() in VNNI


def skip_without_vnni(lanes: Lanes) -> None:
    if not runs(lanes):
        pytest.skip(f"{extension.level()} has no products of bytes in 32 bits")


def wanted(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    shares = (query.double() @ key.double().transpose(-1, -2) * scale).softmax(-1)
    return shares @ value.double()


def error(out: Tensor, right: Tensor) -> float:
    return float((out.double() - right).norm() / right.norm())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@ALL
@pytest.mark.parametrize(
    ("images", "heads", "queries", "keys", "channels", "wide"),
    [
        (1, 1, 1, 1, 1, 1),
        (2, 3, 5, 7, 3, 9),
        (1, 2, 65, 65, 32, 32),
        (2, 2, 257, 257, 64, 64),
        (1, 1, 40, 300, 72, 24),
        (1, 3, 600, 77, 40, 40),
    ],
)
def test_attention_equals_float64(
    level: str, lanes: Lanes, images: int, heads: int, queries: int, keys: int, channels: int, wide: int
) -> None:
    skip_without_vnni(lanes)
    query, key = numbers(images, heads, queries, channels), numbers(images, heads, keys, channels, seed=1)
    value = numbers(images, heads, keys, wide, seed=2)
    out = attention(query, key, value, channels**-0.5, lanes)
    assert out.shape == (images, heads, queries, wide)
    assert error(out, wanted(query, key, value, channels**-0.5)) < LOST[lanes]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_size_and_layout(data: st.DataObject) -> None:
    size = st.integers(1, 40)
    images, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    queries, keys, channels, wide = (data.draw(size) for _ in range(4))
    lanes, magnitude = (
        data.draw(st.sampled_from(list(filter(runs, LOST)))),
        data.draw(st.sampled_from([1e-20, 1.0, 30.0])),
    )
    draws: list[Tensor] = []
    for seed, (tokens, last) in enumerate(((queries, channels), (keys, channels), (keys, wide))):
        # heads within tokens, as a Linear makes them; tokens within heads; or a part of something wider
        how = data.draw(st.integers(0, 2))
        if how == 0:
            draws.append(numbers(images, tokens, heads, last, seed=seed).transpose(1, 2))
        else:
            draws.append(numbers(images, heads, tokens, last + 3 * (how - 1), seed=seed)[..., :last])
    query, key, value = draws[0] * magnitude, draws[1], draws[2] * magnitude
    out = attention(query, key, value, 0.3, lanes)
    right = wanted(query, key, value, 0.3)
    if lanes == Lanes.BYTES:  # against what cannot cancel out among the values; with large scores near ties turn over
        off = float((out.double() - right).norm() / wanted(query, key, value.abs(), 0.3).norm())
        assert off < (0.3 if magnitude > 1 else 0.05)
    else:
        assert error(out, right) < (2e-2 if lanes == Lanes.CODES else 1e-5)


@ALL
def test_the_same_bits_whatever_the_threads(level: str, lanes: Lanes) -> None:
    skip_without_vnni(lanes)
    query, key, value = numbers(3, 2, 5, 1100, 16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(attention(query, key, value, 0.25, lanes))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@ALL
def test_large_scores_are_no_overflow(level: str, lanes: Lanes) -> None:
    skip_without_vnni(lanes)
    query, key, value = numbers(3, 1, 2, 50, 16)
    out = attention(query * 1e3, key * 1e3, value, 0.25, lanes)
    assert bool(out.isfinite().all())
    near = {Lanes.FLOATS: 1e-2, Lanes.CODES: 0.2, Lanes.BYTES: 0.6}[lanes]  # near ties turn over
    assert error(out, wanted(query * 1e3, key * 1e3, value, 0.25)) < near


@ALL
@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-30])
def test_a_scale_may_turn_the_order_of_keys_round(level: str, lanes: Lanes, scale: float) -> None:
    skip_without_vnni(lanes)
    query, key, value = numbers(3, 1, 2, 150, 16)
    most = max(1e-5, LOST[lanes])
    assert error(attention(query, key, value, scale, lanes), wanted(query, key, value, scale)) < most


def test_scores_that_fill_all_their_bits_do_not_overflow(level: str) -> None:
    """64 channels have codes of up to 4,096: scores of both signs and 2^30, whose difference is 2^31."""
    query, key = torch.ones(1, 1, 20, 64), torch.ones(1, 1, 200, 64)
    key[:, :, ::3] = -1
    value = numbers(1, 1, 200, 8)
    lanes = Lanes.CODES
    assert error(attention(query, key, value, 1e-2, lanes), wanted(query, key, value, 1e-2)) < LOST[lanes]


def test_keys_in_bytes_are_held_against_their_mean(level: str) -> None:
    """What all keys have in common changes no share, and costs no codes."""
    skip_without_vnni(Lanes.BYTES)
    query, key, value = numbers(3, 1, 2, 150, 16)
    far = key + 40 * numbers(1, 1, 16, seed=3)
    right = wanted(query, far, value, 0.25)
    assert error(attention(query, far, value, 0.25, Lanes.BYTES), right) < LOST[Lanes.BYTES]


def test_scores_of_as_many_channels_as_bytes_may_have_do_not_overflow(level: str) -> None:
    skip_without_vnni(Lanes.BYTES)
    query, key = torch.ones(1, 1, 3, LARGEST_CHANNELS), torch.ones(1, 1, 20, LARGEST_CHANNELS)
    key[:, :, ::2] = -1
    value, scale = numbers(1, 1, 20, 8), 3 / LARGEST_CHANNELS
    right = wanted(query, key, value, scale)
    assert error(attention(query, key, value, scale, Lanes.BYTES), right) < LOST[Lanes.BYTES]
    assert (
        error(attention(-query, key, value, scale, Lanes.BYTES), wanted(-query, key, value, scale)) < LOST[Lanes.BYTES]
    )
    more = torch.ones(1, 1, 3, LARGEST_CHANNELS + 1)
    with pytest.raises(ValueError, match="no kernel"):
        attention(more, more, value[:, :, :3], scale, Lanes.BYTES)
    unit = Unit("long", SelfAttention(), (1, 3, 3, 1, LARGEST_CHANNELS + 1), torch.float32, torch.device("cpu"), ())
    assert "could leave 31 bits" in (VNMAttentionInt8().refusal(unit) or "")


def test_bytes_are_for_processors_that_sum_them(level: str) -> None:
    query, key, value = numbers(3, 1, 2, 5, 8)
    reason = VNMAttentionInt8().unavailable(torch.device("cpu"))
    if level in VNNI:
        assert reason is None
    else:
        assert "attention-int16 is for that" in (reason or "")
        with pytest.raises(ValueError, match="does not run at this level"):
            attention(query, key, value, 0.25, Lanes.BYTES)


@ALL
def test_not_a_number_stays_where_it_belongs(level: str, lanes: Lanes) -> None:
    skip_without_vnni(lanes)
    query, key, value = numbers(3, 1, 2, 50, 16)
    query = query.clone()
    query[0, 1, 7, 3] = torch.nan
    out = attention(query, key, value, 0.25, lanes)
    assert bool(out[0, 1, 7].isnan().all())
    out[0, 1, 7] = 0
    assert bool(out.isfinite().all())
    key, query = key.clone(), numbers(1, 2, 50, 16)
    key[0, 0, 4, 2] = torch.nan
    out = attention(query, key, value, 0.25, lanes)
    assert bool(out[0, 0].isnan().all()) and bool(out[0, 1].isfinite().all())
    key[0, 0, 4, 2] = torch.inf
    out = attention(query, key, value, 0.25, lanes)
    assert not bool(out[0, 0].isfinite().all()) and bool(out[0, 1].isfinite().all())
    value, key = value.clone(), numbers(1, 2, 50, 16)
    value[0, 1, 9, 5] = torch.inf
    out = attention(query, key, value, 0.25, lanes)
    assert not bool(out[0, 1, :, 5].isfinite().any())
    out[0, 1, :, 5] = 0
    assert bool(out.isfinite().all())


def test_wrong_numbers_are_refused_by_the_extension() -> None:
    x = numbers(1, 1, 4, 4)
    pointers = [x.data_ptr()] * 4
    strides = [16, 16, 4] * 3
    for wrong in ([0, 1, 4, 4, 4, 4, 128], [1, 1, 4, 0, 4, 4, 128], [1, 1, 4, 4, 4, 4, 0]):
        with pytest.raises(ValueError, match="no kernel"):
            extension.attend(*pointers, *wrong, 1, int(Lanes.FLOATS), 1.0, *strides)
    with pytest.raises(ValueError, match="no kernel"):  # sums of more products could leave 32 bits
        extension.attend(*pointers, 1, 1, 4, 4, 4, 4, 130, 1, int(Lanes.CODES), 1.0, *strides)
    with pytest.raises(ValueError, match="does not run at this level"):
        extension.attend(*pointers, 1, 1, 4, 4, 4, 4, 128, 1, int(Lanes.HALVES), 1.0, *strides)
    with pytest.raises(TypeError):
        extension.attend(1, 2, 3)


class Attends(nn.Module):
    """Self-attention as a transformer's block has it; `extra` goes to torch's function."""

    def __init__(self, dim: int = 32, heads: int = 4, **extra: Any) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.heads, self.extra = heads, extra

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, dim = x.shape
        query, key, value = self.qkv(x).view(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = self.attend(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(images, tokens, dim))
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **self.extra)


class Named(Attends):
    """Torch's function takes its tensors by place or by name."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value=value)


class Model(nn.Module):
    def __init__(self, **extra: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Attends(**extra), Attends(**extra)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


X = numbers(2, 50, 32)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of queries that kernels got, in order."""
    found: list[tuple[int, ...]] = []

    def watched(query: Tensor, *rest: Any) -> Tensor:
        found.append(tuple(query.shape))
        return attention(query, *rest)

    monkeypatch.setattr("compressor.lower.attention.attention", watched)
    return found


def lowered(model: nn.Module) -> nn.Module:
    form = copy.deepcopy(model)
    for at in ("first", "second"):
        attach(form, at, FusedAttention(SelfAttention(), Lanes.FLOATS))
    return form


@torch.no_grad()
def test_a_lowered_model_calls_the_kernels_and_gives_the_same(taken: list[tuple[int, ...]]) -> None:
    model = Model().eval()
    form = lowered(model)
    assert error(form(X), model.double()(X.double())) < 1e-5
    assert taken == [(2, 4, 50, 8)] * 2
    assert [name for name, _ in form.named_modules()] == [name for name, _ in Model().named_modules()]
    form(numbers(1, 9, 32))
    assert taken[2:] == [(1, 4, 9, 8)] * 2  # other sizes too


@torch.no_grad()
def test_copies_and_files_of_a_lowered_model_are_lowered_too(taken: list[tuple[int, ...]]) -> None:
    form = lowered(Model().eval())
    out = form(X)
    second = copy.deepcopy(form)
    form.first.qkv.weight.zero_()
    assert torch.equal(second(X), out)  # nothing of the copy is the first's
    file = io.BytesIO()
    torch.save(second, file)
    file.seek(0)
    third = torch.load(file, weights_only=False)
    del taken[:]
    assert torch.equal(third(X), out)
    assert len(taken) == 2


@torch.no_grad()
def test_a_lowered_model_is_one_graph(taken: list[tuple[int, ...]]) -> None:
    model = Model().eval()
    compiled = torch.compile(lowered(model), fullgraph=True, backend="aot_eager")
    assert error(compiled(X), model(X).double()) < 1e-5
    assert len(taken) == 2  # traced once, and again nowhere
    exported = torch.export.export(lowered(model), (X,)).module()
    assert error(exported(X), model(X).double()) < 1e-5


@torch.no_grad()
def test_a_mode_around_the_model_sees_its_attention(taken: list[tuple[int, ...]]) -> None:
    class Skips(TorchFunctionMode):  # as diffusers has it
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[2] if func is F.scaled_dot_product_attention else func(*args, **(kwargs or {}))

    model = Model().eval()
    form = lowered(model)
    for run in (form, torch.compile(form, backend="aot_eager")):
        with Skips():
            assert torch.allclose(run(X), model(X), atol=1e-6) and taken == []
    with torch.device("cpu"):
        form(X)
    assert len(taken) == 2  # a default device keeps nothing from the kernels


@pytest.mark.parametrize(
    "extra",
    [{"is_causal": True}, {"attn_mask": torch.ones(50, 50).tril().bool()}, {"attn_mask": torch.zeros(50, 50)}],
    ids=["causal", "mask", "bias"],
)
@torch.no_grad()
def test_what_the_kernels_do_not_do_stays_with_torch(extra: dict[str, Any], taken: list[tuple[int, ...]]) -> None:
    model = Model(**extra).eval()
    assert torch.equal(lowered(model)(X), model(X)) and taken == []
    plan = compressor.lower(model, X, cache=False).plan
    assert {layer.kind for layer in plan.layers} == {"linear"}


@torch.no_grad()
def test_a_scale_of_the_models_own_is_kept(taken: list[tuple[int, ...]]) -> None:
    model = Model(scale=0.7).eval()
    assert error(lowered(model)(X), model(X).double()) < 1e-5 and len(taken) == 2
    (first, *_) = [layer for layer in compressor.lower(model, X, cache=False).plan.layers if layer.kind == "attention"]
    assert all(one.error is None or one.error < 1e-5 for one in first.candidates)


@torch.no_grad()
def test_tensors_that_are_given_by_name_are_found(taken: list[tuple[int, ...]]) -> None:
    plan = compressor.lower(Named().eval(), X, cache=False).plan
    assert [layer.name for layer in plan.layers if layer.kind == "attention"] == [""] and taken


def test_a_gradient_goes_through_torch(taken: list[tuple[int, ...]]) -> None:
    form = lowered(Model().eval())
    form(X).sum().backward()
    assert taken == [] and form.first.qkv.weight.grad is not None


def test_calls_that_do_not_fit() -> None:
    x = numbers(1, 2, 8, 4)
    assert fits(x, x, x) and fits(x, x[:, :, :3], x[:, :, :3])
    assert not fits(x.double(), x.double(), x.double())
    assert not fits(x.bfloat16(), x.bfloat16(), x.bfloat16())
    assert not fits(x[0], x[0], x[0])
    assert not fits(x, x[:, :1], x[:, :1], enable_gqa=True)
    assert not fits(x.transpose(2, 3), x.transpose(2, 3), x.transpose(2, 3))
    assert not fits(x, x, x, None, 0.1)
    assert not fits(x[:, :, :0], x, x)
    assert not fits(nn.Parameter(x), x, x)  # a gradient is wanted of it


def attending(plan: Plan, name: str) -> Plan:
    """`plan` with every attention in the backend of that name, and every layer as it is."""
    layers = tuple(
        layer.model_copy(update={"choice": name if layer.kind == "attention" else "eager"}) for layer in plan.layers
    )
    return plan.model_copy(update={"choice": "lowered", "layers": layers})


def test_lowering_finds_attention_and_a_plan_applies_it_again(taken: list[tuple[int, ...]]) -> None:
    model = Model().eval()
    plan = compressor.lower(model, X, ["attention"], cache=False).plan
    attentions = {layer.name: layer for layer in plan.layers if layer.kind == "attention"}
    assert set(attentions) == {"first", "second"}
    first = attentions["first"]
    assert first.weights == () and first.shapes == ((400, 50, 8), (400, 8, 50))
    assert [one.backend for one in first.candidates] == ["eager", "attention"]
    others = [one.backend for layer in plan.layers if layer.kind == "linear" for one in layer.candidates]
    assert set(others) == {"eager"}  # it is not asked about layers
    again = Plan.model_validate_json(attending(plan, "attention").model_dump_json())
    with torch.no_grad():
        form = compressor.lower(model, numbers(3, 20, 32), ["attention"], plan=again).model
        del taken[:]
        form(X)
    assert taken == [(2, 4, 50, 8)] * 2
    before = again.model_copy(update={"layers": tuple(one for one in again.layers if one.kind != "attention")})
    with torch.no_grad():  # a plan from before attention was lowered
        form = compressor.lower(model, X, ["attention"], plan=before).model
        del taken[:]
        form(X)
    assert taken == []


class Attended(nn.Module):
    """Attention from pictures to the tokens of a prompt, of which there are others than of the picture."""

    def __init__(self, dim: int = 32, prompt: int = 24, heads: int = 4, **extra: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(prompt, dim), nn.Linear(prompt, dim)
        self.heads, self.extra = heads, extra

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        given = ((self.query, x), (self.key, prompt), (self.value, prompt))
        query, key, value = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, y in given)
        return F.scaled_dot_product_attention(query, key, value, **self.extra).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("extra", [{}, {"scale": 0.1}])
def test_attention_to_other_tokens_is_found_and_lowered_too(
    extra: dict[str, Any], taken: list[tuple[int, ...]]
) -> None:
    model, prompt = Attended(**extra).eval(), numbers(2, 7, 24)
    plan = compressor.lower(model, (X, prompt), ["attention"], cache=False).plan
    (found,) = [layer for layer in plan.layers if layer.kind == "attention"]
    assert found.shapes == ((400, 7, 8), (400, 8, 7)) and found.gflop == pytest.approx(2 * 2 * 400 * 7 * 8 / 1e9)
    own = found.candidate("attention")
    assert own is not None and own.refused is None and own.error is not None and own.error < 1e-5
    with torch.no_grad():
        form = compressor.lower(model, (X, prompt), ["attention"], plan=attending(plan, "attention")).model
        del taken[:]
        assert error(form(X, prompt), model.double()(X.double(), prompt.double())) < 1e-5
        assert taken == [(2, 4, 50, 8)]
        more = numbers(3, 9, 24)
        assert error(form(numbers(3, 20, 32), more), model(numbers(3, 20, 32).double(), more.double())) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("name", "most"), [("attention", 1e-5), ("attention-int16", 2e-3), ("attention-int8", 3e-2)])
def test_attention_to_other_tokens_in_few_bits_and_compiled(name: str, most: float) -> None:
    if name == "attention-int8" and extension.level() not in VNNI:
        pytest.skip("this level has no VNNI")
    model, prompt = Attended().eval(), numbers(2, 7, 24)
    plan = compressor.lower(model, (X, prompt), [name], tolerance=0.05, cache=False).plan
    form = compressor.lower(model, (X, prompt), [name], plan=attending(plan, name), tolerance=0.05).model
    assert error(form(X, prompt), model(X, prompt).double()) < most
    compiled: Any = torch.compile(form, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, prompt), form(X, prompt))


def test_values_of_other_channels_than_the_keys_are_no_unit() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x[:, None]
            return F.scaled_dot_product_attention(y, y, y[..., :9])

    assert compressor.lower(Wide(), X, cache=False).plan.layers == ()


def test_eight_bits_are_for_those_who_ask() -> None:
    model = Model().eval()
    names = {one.backend for layer in compressor.lower(model, X, cache=False).plan.layers for one in layer.candidates}
    assert "attention" in names and not {"attention-int16", "attention-int8"} & names
    layers = compressor.lower(model, X, tolerance=0.02, cache=False).plan.layers
    (first, *_) = [layer for layer in layers if layer.kind == "attention"]
    found = first.candidate("attention-int16")
    assert found is not None and found.error is not None and 1e-6 < found.error < 0.02
    if extension.level() in VNNI:
        coarser = first.candidate("attention-int8")
        assert coarser is not None and coarser.error is not None and found.error < coarser.error


def test_attention_around_other_attention_stays_so_that_what_is_inside_does() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # two calls that differ: left alone
            return F.scaled_dot_product_attention(x, x, x) + F.scaled_dot_product_attention(x, x, x, scale=0.5)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            y = x[:, None]
            return F.scaled_dot_product_attention(y, y, y) + self.inner(y)

    assert compressor.lower(Outer(), X, tolerance=0.05, cache=False).plan.layers == ()


def test_a_module_of_several_attentions_that_differ_or_of_several_places_is_left_alone() -> None:
    class Differ(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x[:, None]
            return F.scaled_dot_product_attention(y, y, y) + F.scaled_dot_product_attention(y, y[:, :, :9], y[:, :, :9])

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Attends()
            self.two = self.one

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(x))
            return out

    for model in (Differ(), Shared()):
        plan = compressor.lower(model.eval(), X, cache=False).plan
        assert [layer for layer in plan.layers if layer.kind == "attention"] == []
