"""Packed weights: as a slow reader of the format sees them, bit for bit the same again, and refused where they are not."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import nn

import compressor
from compressor import NM, Unstructured, files, saving
from compressor.cost.macs import costs
from compressor.errors import CompressorError
from compressor.saving import model as saved_files
from compressor.saving import packing, plain
from compressor.saving.packing import pack, unpack
from compressor.weights import FILE_METADATA, load_strictly, part_names, read_weights

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [*FLOATS, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64]


def bits(tensor):
    """The bits of a tensor as nested lists of whole numbers, and its dtype and shape."""
    return tensor.contiguous().view(WORDS[tensor.element_size()]).tolist(), tensor.dtype, tuple(tensor.shape)


def slowly_packed(weight, n, m, v):
    """The values' bits as nested lists (out, in / m * n, kernel positions), and the index's bytes, entry by entry."""
    outputs, inputs, *_ = weight.shape
    words = weight.reshape(outputs, inputs, -1).contiguous().view(WORDS[weight.element_size()]).tolist()
    positions = range(len(words[0][0]))
    values = [[[None for _ in positions] for _ in range(inputs // m * n)] for _ in range(outputs)]
    places = {}
    for block, k, group in itertools.product(range(outputs // v), positions, range(inputs // m)):
        rows = range(block * v, block * v + v)
        kept = [p for p in range(m) if any(words[row][group * m + p][k] for row in rows)]
        free = [p for p in range(m) if p not in kept]
        for slot, p in enumerate(sorted(kept + free[: n - len(kept)])):
            places[block, group * n + slot, k] = p
            for row in rows:
                values[row][group * n + slot][k] = words[row][group * m + p][k]
    width = 0 if n == m else next(width for width in range(1, 30) if 2**width >= m)
    stream = [p >> bit & 1 for _, p in sorted(places.items()) for bit in range(width)]
    stream += [0] * (-len(stream) % 8)
    index = [sum(bit << i for i, bit in enumerate(stream[start : start + 8])) for start in range(0, len(stream), 8)]
    return values, index


@st.composite
def weights(draw):
    """A weight and the pattern that it obeys: some groups are short of survivors, and some survivors are -0.0."""
    m = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 300]))
    n = draw(st.integers(1, min(m, 8)) | st.just(m))
    pattern = NM(n, m, draw(st.integers(1, 3)))
    groups = 1 if m == 300 else draw(st.integers(1, 3))
    kernel = draw(st.sampled_from([(), (), (1,), (3,), (2, 2), (1, 2, 1)]))
    shape = (pattern.v * draw(st.integers(1, 4)), m * groups, *kernel)
    dtype = draw(st.sampled_from(DTYPES))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if dtype.is_floating_point or dtype.is_complex:
        weight = torch.randn(shape, generator=rng).to(dtype)
    else:
        weight = torch.randint(0, 100, shape, generator=rng).to(dtype)
    if dtype.is_floating_point:
        minus_zero = torch.tensor(-0.0).to(dtype).view(WORDS[weight.element_size()])
        chosen = torch.rand(shape, generator=rng) < 0.1
        weight = torch.where(chosen, minus_zero, weight.view(minus_zero.dtype)).view(dtype)
    dropped = ~pattern.mask(torch.rand(shape, generator=rng)).keep
    dropped |= torch.rand(shape, generator=rng) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    words = weight.view(WORDS[weight.element_size()])
    return words.masked_fill(dropped, 0).view(dtype), pattern


# --- One weight. ---


@settings(max_examples=300, deadline=None)
@given(case=weights())
def test_the_packed_form_is_the_slow_one_and_unpacks_to_the_same_bits(case):
    weight, pattern = case
    values, index = pack(weight, pattern)
    expected_values, expected_index = slowly_packed(weight, pattern.n, pattern.m, pattern.v)
    assert values.shape == (len(weight), weight.shape[1] // pattern.m * pattern.n, *weight.shape[2:])
    assert values.dtype == weight.dtype
    assert bits(values.reshape(*values.shape[:2], -1))[0] == expected_values
    assert index.dtype == torch.uint8 and index.tolist() == expected_index
    assert bits(unpack(values, index, pattern)) == bits(weight)


@pytest.mark.parametrize(
    ("pattern", "shape", "length"),
    [
        (NM(2, 4), (8, 16), 8 * 8 * 2 // 8),
        (NM(4, 8), (8, 16), 8 * 8 * 3 // 8),
        (NM(1, 2), (8, 16), 8 * 8 // 8),
        (NM(1, 2), (1, 2), 1),
        (NM(2, 5), (3, 5), 3),  # 18 bits
        (NM(2, 4, 4), (8, 16), 8 * 8 * 2 // 8 // 4),
        (NM(2, 4), (8, 16, 3, 3), 9 * 8 * 8 * 2 // 8),
        (NM(4, 4), (8, 16), 0),
        (NM(1, 1), (8, 16), 0),
    ],
    ids=str,
)
def test_the_index_takes_the_fewest_bits(pattern, shape, length):
    weight = pattern.mask(torch.rand(shape)).apply(torch.ones(shape))
    _, index = pack(weight, pattern)
    assert len(index) == packing.index_bytes(shape, pattern) == length


def test_a_weight_larger_than_a_piece_is_packed_in_pieces(monkeypatch):
    for pattern, shape in [(NM(2, 4), (7, 12)), (NM(2, 4, 3), (9, 8, 2)), (NM(3, 8), (5, 16, 1, 2))]:
        weight = pattern.mask(torch.rand(shape)).apply(torch.randn(shape))
        whole = pack(weight, pattern)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_CHUNK", 30)
            parts = pack(weight, pattern)
            assert [bits(part) for part in parts] == [bits(part) for part in whole]
            assert bits(unpack(*parts, pattern)) == bits(weight)


def test_strides_and_gradients_do_not_matter():
    weight = NM(2, 4).mask(torch.rand(8, 8, 2, 2)).apply(torch.randn(8, 8, 2, 2))
    expected = [bits(part) for part in pack(weight, NM(2, 4))]
    strided = weight.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    assert [bits(part) for part in pack(strided, NM(2, 4))] == expected
    assert all(part.is_contiguous() for pattern in (NM(2, 4), NM(4, 4)) for part in pack(strided, pattern))
    values, index = pack(nn.Parameter(weight), NM(2, 4))
    assert [bits(values), bits(index)] == expected and not values.requires_grad
    twice = index.repeat_interleave(2)[::2]  # a view with strides
    assert bits(unpack(values.transpose(2, 3).contiguous().transpose(2, 3), twice, NM(2, 4))) == bits(weight)


LETTERS = (0.0, -0.0, 1.0)


@pytest.mark.parametrize(
    ("pattern", "rows"), [(NM(2, 4), 1), (NM(1, 3), 1), (NM(2, 3), 1), (NM(1, 2), 3), (NM(1, 3, 2), 2)]
)
def test_unpack_accepts_what_pack_writes_and_nothing_else(pattern, rows):
    def key(values, index):
        return str(bits(values)[0]), tuple(index.tolist())

    written = set()
    for letters in itertools.product(LETTERS, repeat=rows * pattern.m):
        try:
            written.add(key(*pack(torch.tensor(letters).view(rows, pattern.m), pattern)))
        except CompressorError:
            alive = torch.tensor([str(letter) != "0.0" for letter in letters]).view(-1, pattern.v, pattern.m).any(1)
            assert int(alive.sum(-1).max()) > pattern.n
    accepted = set()
    for letters in itertools.product(LETTERS, repeat=rows * pattern.n):
        for byte in range(256):
            parts = torch.tensor(letters).view(rows, pattern.n), torch.tensor([byte], dtype=torch.uint8)
            try:
                weight = unpack(*parts, pattern)
            except CompressorError:
                continue
            accepted.add(key(*parts))
            assert key(*pack(weight, pattern)) == key(*parts)
    assert accepted == written


def test_a_minus_zero_too_many_is_not_lost_but_refused():
    weight = torch.tensor([[1.0, 2.0, -0.0, 0.0]])
    NM(2, 4).verify(weight)
    with pytest.raises(CompressorError, match=r"not 2:4: .* other than \+0\.0"):
        pack(weight, NM(2, 4))


def test_rows_that_share_a_choice_must_share_it():
    weight = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    pack(weight, NM(1, 4))
    with pytest.raises(CompressorError, match="not 2:1:4"):
        pack(weight, NM(1, 4, 2))


@pytest.mark.parametrize("shape", [(8,), (8, 6), (8, 0), (0, 8), (), (7, 8)])
def test_a_shape_that_cannot_have_the_pattern_is_refused(shape):
    with pytest.raises(CompressorError, match="2:2:4"):
        pack(torch.zeros(shape), NM(2, 4, 2))


def test_a_dtype_without_a_word_of_its_size_is_refused():
    with pytest.raises(CompressorError, match="complex128"):
        pack(torch.zeros(4, 4, dtype=torch.complex128), NM(2, 4))


def parts_of_ones():
    weight = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]]).repeat(2, 1)
    return pack(weight, NM(2, 4))


def index_of(*places):
    return torch.tensor([sum(p << 2 * i for i, p in enumerate(places))], dtype=torch.uint8)


def test_the_layout_is_the_documented_one():
    values, index = parts_of_ones()
    assert values.tolist() == [[1.0] * 4] * 2
    assert index.tolist() == [0b01_00_11_01] * 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v, i: (v[:, :3], i), "dim 1 divisible by 2"),
        (lambda v, i: (v[0], i), "at least 2 dims"),
        (lambda v, i: (v[:0], i[:0]), "empty"),
        (lambda v, i: (v, i[:-1]), r"index must be \(2,\)"),
        (lambda v, i: (v, torch.cat([i, i[:1]])), r"index must be \(2,\)"),
        (lambda v, i: (v, i.view(2, 1)), r"index must be \(2,\)"),
        (lambda v, i: (v, i.view(torch.int8)), "torch.uint8"),
        (lambda v, i: (v.to(torch.complex128), i), "complex128"),
        (lambda v, i: (v, torch.cat([i[:1], index_of(1, 3, 2, 2)])), "not ascending"),
        (lambda v, i: (v, torch.cat([i[:1], index_of(1, 3, 3, 0)])), "not ascending"),
        (lambda v, i: (v * torch.tensor([0.0, 1, 1, 1]), torch.cat([i[:1], index_of(1, 3, 0, 1)])), "first free"),
        (lambda v, i: (v[:1, :2], index_of(1, 3, 0, 1)), "bits after"),
    ],
)
def test_parts_that_pack_does_not_write_are_refused(change, said):
    with pytest.raises(CompressorError, match=said) as caught:
        unpack(*change(*parts_of_ones()), NM(2, 4))
    assert caught.value.hint


def test_a_place_outside_of_its_group_is_refused():
    values, index = pack(torch.tensor([[0.0, 1.0, 1.0]]), NM(2, 3))
    assert index.tolist() == [0b10_01]
    with pytest.raises(CompressorError, match="outside of its group"):
        unpack(values, torch.tensor([0b11_01], dtype=torch.uint8), NM(2, 3))


def test_half_precision_takes_nine_sixteenths_and_less_where_rows_share():
    torch.manual_seed(0)
    share = {}
    for pattern in (NM(2, 4), NM(2, 4, 4)):
        weight = pattern.mask(torch.rand(64, 128)).apply(torch.randn(64, 128)).half()
        share[pattern.v] = sum(part.nbytes for part in pack(weight, pattern)) / weight.nbytes
    assert share == {1: 0.5625, 4: 0.515625}


# --- In a file. ---


def network(dtype=torch.float32, seed=0):
    """A convolution, a linear layer and a norm."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(16, 16), nn.LayerNorm(16))
    return nn.Sequential(*layers).to(dtype)


TWO_OF_FOUR = NM(2, 4)


def pruned(model, pattern=TWO_OF_FOUR):
    """The masks of `model`, after they have been applied."""
    masks = {}
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            masks[name] = pattern.mask(weight.detach().float().abs())
            weight.data = masks[name].apply(weight.data)
    return masks


def saved(tmp_path, model, masks, **options):
    compressor.save(tmp_path / "saved", model, masks, **options)
    return tmp_path / "saved"


def forge(folder):
    """Write the manifest that an honest writer of these very files would have written."""
    entries = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in ((path.name, path.read_bytes()) for path in folder.iterdir())
        if name != files.MANIFEST
    }
    (folder / files.MANIFEST).write_text(json.dumps({"schema_version": 1, "files": entries}))


def state_bits(model):
    return {name: bits(value) for name, value in model.state_dict().items()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    pattern=st.sampled_from([NM(2, 4), NM(2, 4, 4), NM(1, 4), NM(4, 8, 2), NM(4, 4), Unstructured(0.5)]),
    packed=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(dtype=torch.float16, pattern=NM(2, 4, 4), packed=True, seed=0)
def test_a_model_comes_back_bit_for_bit(tmp_path, dtype, pattern, packed, seed):
    model = network(dtype, seed)
    masks = pruned(model, pattern)
    before = state_bits(model)
    folder = saved(tmp_path, model, masks, packed=packed)
    assert state_bits(compressor.load(folder, model=network(dtype, seed + 1))) == before == state_bits(model)
    assert "packed" in json.loads((folder / "config.json").read_text()) or not packed or pattern.density in (1, 0.5)


def test_packed_and_plain_files_hold_the_same_weights(tmp_path):
    model = network(torch.float16)
    masks = pruned(model)
    packed = saved(tmp_path / "packed", model, masks)
    plain = saved(tmp_path / "plain", model, masks, packed=False)
    assert load_file(plain / "model.safetensors").keys() == model.state_dict().keys()
    found, expected = saving.read_config(packed), saving.read_config(plain)
    assert (found.packed, expected.packed) == (["0.weight", "2.weight"], [])
    assert found.weights_sha256 == expected.weights_sha256 and found.patterns == expected.patterns
    names = {f"{name}.{part}" for name in found.packed for part in ("values", "index")}
    tensors = load_file(packed / "model.safetensors")
    assert tensors.keys() == names | (model.state_dict().keys() - set(found.packed))
    dense = sum(model.state_dict()[name].nbytes for name in found.packed)
    assert sum(tensors[name].nbytes for name in names) == 0.5625 * dense


def test_plain_files_say_nothing_of_packing(tmp_path):
    model = network()
    folder = saved(tmp_path, model, pruned(model), packed=False)
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() == {"schema_version", "model", "patterns", "weights_sha256"}


def test_the_bytes_do_not_depend_on_masks_that_give_the_same_weights(tmp_path):
    model = network()
    masks = pruned(model)
    model[2].weight.data[3] = 0.0
    others = {**masks, "2.weight": NM(2, 4).mask(model[2].weight.detach().abs())}
    assert not torch.equal(masks["2.weight"].keep, others["2.weight"].keep)
    first, second = saved(tmp_path / "first", model, masks), saved(tmp_path / "second", model, others)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_masked_minus_zero_keeps_its_weight_plain_and_its_sign(tmp_path):
    model = network()
    masks = pruned(model)
    model[2].weight.data[~masks["2.weight"].keep] = -0.0
    folder = saved(tmp_path, model, masks)
    assert saving.read_config(folder).packed == ["0.weight"]
    assert state_bits(compressor.load(folder, model=network(seed=1))) == state_bits(model)


@pytest.mark.parametrize("pattern", [NM(4, 4), NM(15, 16), Unstructured(0.5)], ids=str)
def test_what_gains_nothing_or_is_not_n_m_stays_plain(tmp_path, pattern):
    model = network(torch.float16)
    folder = saved(tmp_path, model, pruned(model, pattern))
    assert saving.read_config(folder).packed == []
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
@pytest.mark.parametrize("name", ["w", "a" * 200, '"\n\0\\', "é中"], ids=["short", "long", "escaped", "other letters"])
def test_packing_never_makes_a_file_larger_and_starts_where_it_gains(dtype, name):
    gains = {}
    for width in range(4, 1200, 4):
        state = {name: NM(2, 4).mask(torch.rand(1, width)).apply(torch.ones(1, width)).to(dtype)}
        tensors, packed = packing.packed_state(state, {name: "2:4"})
        plain, stored = (len(save(each, metadata=FILE_METADATA)) for each in (state, tensors))
        assert stored < plain if packed else stored == plain
        parts = dict(zip(part_names(name), pack(state[name], NM(2, 4)), strict=True))
        gains[plain - len(save(parts, metadata=FILE_METADATA))] = bool(packed)
    assert not gains[min(gains)] and gains[max(gains)]
    assert all(packed for gain, packed in gains.items() if gain > 64 + 6 * len(name))


@pytest.mark.parametrize("part", ["values", "index"])
def test_a_tensor_with_the_name_of_a_part_is_not_overwritten(tmp_path, part):
    class Named(nn.Module):
        """Its state has `weight` and `weight.values`."""

        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.weight = nn.Parameter(torch.randn(32, 32))
            self.other = nn.Linear(32, 32)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[f"{prefix}weight"] = self.weight.data
            destination[f"{prefix}weight.{part}"] = self.weight.data.flip(0)

        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
            assert torch.equal(state[f"{prefix}weight.{part}"], state[f"{prefix}weight"].flip(0))
            self.weight.data.copy_(state[f"{prefix}weight"])

        def load_state_dict(self, state, strict=True):
            return super().load_state_dict(state, strict=False)  # for the key that no parameter has

    model = Named(0)
    folder = saved(tmp_path, model, pruned(model))
    assert saving.read_config(folder).packed == ["other.weight"]
    assert state_bits(compressor.load(folder, model=Named(1))) == state_bits(model)


def test_eight_bit_floats_are_saved_packed(tmp_path):
    class Small(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            weight = torch.ones(32, 32) * torch.tensor([0.0, 1.5, -2.0, 0.0]).repeat(8)
            self.register_buffer("weight", weight.to(dtype))

    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        model = Small(dtype)
        masks = {"weight": NM(2, 4).mask(model.weight.float().abs())}
        folder = saved(tmp_path, model, masks)
        assert saving.read_config(folder).packed == ["weight"]
        empty = Small(dtype)
        empty.weight.zero_()
        assert state_bits(compressor.load(folder, model=empty)) == state_bits(model)


def test_the_reported_size_is_that_of_the_packed_file(tmp_path, model, adapter):
    for pattern in (NM(2, 4), NM(2, 4, 4), NM(4, 4)):
        masks = pruned(model, pattern)
        found = costs(model, adapter, {name: str(mask.pattern) for name, mask in masks.items()}).size_bytes
        assert found == (saved(tmp_path, model, masks) / "model.safetensors").stat().st_size
    assert costs(model, adapter, {}).size_bytes > costs(model, adapter, dict.fromkeys(masks, "2:4")).size_bytes


def test_the_size_of_a_file_is_told_without_writing_it():
    state = {str(dtype): torch.zeros(16, dtype=torch.uint8).view(dtype) for dtype in plain._TYPES}
    for name in [name for name in state if "fnu" in name]:
        with suppress(SafetensorError, KeyError, ValueError):  # versions before know fewer
            save({name: state[name]})
            continue
        del state[name]
    state |= {
        "a" * 200: torch.ones(3, 1, 7),
        '"\n\0\\é中\x7f': torch.tensor(1.0),
        "": torch.empty(0, 4, dtype=torch.int64),
    }
    rng = random.Random(0)
    for count in range(len(state) + 1):
        some = {name: state[name] for name in rng.sample(sorted(state), count)}
        assert plain.file_bytes({n: t.to("meta") for n, t in some.items()}) == len(save(some, metadata=FILE_METADATA))


# --- Files by others. ---


def refused(folder, *said):
    """`folder` is refused with a message that says so and a hint, and the module that was given is as it was."""
    module = network(seed=7)
    before = state_bits(module)
    with pytest.raises(CompressorError) as caught:
        compressor.load(folder, model=module)
    assert str(folder) in caught.value.message and caught.value.hint
    for part in said:
        assert part in caught.value.message
    assert state_bits(module) == before


@pytest.fixture
def folder(tmp_path):
    model = network()
    return saved(tmp_path, model, pruned(model))


def rewritten(folder, change):
    """Change the tensors in the file, and make everything but the hash of the weights agree with it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    forge(folder)


def configured(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    forge(folder)


VALUES, INDEX = "2.weight.values", "2.weight.index"


def with_places(tensors, *places):
    """Put the four places of the first byte of the index."""
    tensors[INDEX][0] = sum(p << 2 * i for i, p in enumerate(places))


HOSTILE = {
    "no values": (lambda t: t.pop(VALUES), (VALUES, "missing")),
    "no index": (lambda t: t.pop(INDEX), (INDEX, "missing")),
    "plain as well": (lambda t: t.update({"2.weight": torch.zeros(16, 16)}), ("2.weight", "plain")),
    "one part more": (lambda t: t.update({"3.weight.values": torch.zeros(4)}), ("unexpected 3.weight.values",)),
    "fewer rows": (lambda t: t.update({VALUES: t[VALUES][:15]}), ("2.weight", "index must be")),
    "fewer rows and places": (
        lambda t: t.update({VALUES: t[VALUES][:8], INDEX: t[INDEX][:16]}),
        ("(8, 16)", "(16, 16)"),
    ),
    "odd values": (lambda t: t.update({VALUES: t[VALUES][:, :7]}), ("2.weight", "divisible by 2")),
    "flat values": (lambda t: t.update({VALUES: t[VALUES].flatten()}), ("2.weight", "at least 2 dims")),
    "a number": (lambda t: t.update({VALUES: t[VALUES][0, 0]}), ("2.weight", "at least 2 dims")),
    "no rows": (lambda t: t.update({VALUES: t[VALUES][:0]}), ("2.weight", "empty")),
    "huge and empty": (lambda t: t.update({VALUES: torch.zeros(2**40, 0)}), ("2.weight", "empty")),
    "another dtype": (lambda t: t.update({VALUES: t[VALUES].sign().to(torch.int32)}), ("2.weight", "int32")),
    "complex": (lambda t: t.update({VALUES: t[VALUES].to(torch.complex64)}), ("2.weight", "complex64")),
    "short index": (lambda t: t.update({INDEX: t[INDEX][:-1]}), ("2.weight", "index must be")),
    "long index": (lambda t: t.update({INDEX: torch.cat([t[INDEX], t[INDEX]])}), ("2.weight", "index must be")),
    "square index": (lambda t: t.update({INDEX: t[INDEX].view(4, -1)}), ("2.weight", "index must be")),
    "signed index": (lambda t: t.update({INDEX: t[INDEX].view(torch.int8)}), ("2.weight", "torch.uint8")),
    "the same place": (lambda t: with_places(t, 1, 1, 0, 1), ("2.weight", "not ascending")),
    "places back to front": (lambda t: with_places(t, 0, 1, 3, 2), ("2.weight", "not ascending")),
    "another filling": (lambda t: (t[VALUES][0].zero_(), with_places(t, 0, 1, 0, 2)), ("2.weight", "first free")),
    "other places": (lambda t: with_places(t, 0, 1, 2, 3), ("weights_sha256",)),
    "other values": (lambda t: t[VALUES][0].neg_(), ("weights_sha256",)),
    "NaN": (lambda t: t[VALUES][3].fill_(float("nan")), ("2.weight", "NaN")),
}


@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(folder, change, said):
    rewritten(folder, change)
    refused(folder, *said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"packed": []}, "missing 0.weight"),
        ({"packed": ["2.weight"]}, "missing 0.weight"),
        ({"packed": ["0.weight", "2.weight", "2.weight"]}, "2.weight twice"),
        ({"packed": ["0.weight", "2.weight", "3.weight"]}, "3.weight with the pattern None"),
        ({"patterns": {"0.weight": "2:4"}}, "2.weight with the pattern None"),
        ({"patterns": {"0.weight": "2:4", "2.weight": "unstructured:0.5"}}, "2.weight with the pattern unstructured"),
        ({"patterns": {"0.weight": "2:4", "2.weight": "two"}}, "'two'"),
        ({"patterns": {"0.weight": "2:4", "2.weight": "1:4"}}, "model has (16, 16)"),
        ({"patterns": {"0.weight": "2:4", "2.weight": "2:2:4"}}, "index must be"),
        ({"patterns": {"0.weight": "2:4", "2.weight": "2:3"}}, "model has (16, 16)"),
        ({"patterns": {"0.weight": "2:4", "2.weight": "8:999999"}}, "index must be"),
    ],
)
def test_a_config_that_does_not_belong_to_the_file_is_refused(folder, changes, said):
    configured(folder, **changes)
    refused(folder, said)


def test_a_plain_file_that_is_said_to_be_packed_is_refused(tmp_path):
    model = network()
    folder = saved(tmp_path, model, pruned(model), packed=False)
    configured(folder, packed=["2.weight"])
    refused(folder, "2.weight", "plain")


def test_a_pattern_that_would_take_all_memory_is_refused_before_anything_is_made(folder, monkeypatch):
    def never(*arguments):
        raise AssertionError("unpacked")

    def huge(tensors):
        tensors[VALUES] = torch.ones(2**12, 1)
        tensors[INDEX] = torch.zeros(2**12 * 20 // 8, dtype=torch.uint8)

    monkeypatch.setattr(packing, "unpack", never)
    monkeypatch.setattr(saved_files, "load_file", never)
    configured(folder, patterns={"0.weight": "2:4", "2.weight": "1:999999"})
    rewritten(folder, huge)
    refused(folder, "2.weight: file has (4096, 999999), model has (16, 16)")


def test_weights_alone_are_refused_with_what_to_do(folder):
    with pytest.raises(CompressorError, match=r"missing 0\.weight") as caught:
        load_strictly(network(), read_weights(folder / "model.safetensors"), folder)
    assert "packed=False" in caught.value.hint


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1, -200])
def test_a_truncated_file_is_refused(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    forge(folder)
    refused(folder, "model.safetensors")


def test_no_flipped_bit_is_read_as_something_else(tmp_path, monkeypatch):
    """With every hash made to agree: a file is refused, or holds exactly what `save` would write for what was read."""
    original = saved_files.state_sha256
    model = network(torch.float16)
    model_bits = state_bits(model)
    masks = pruned(model, NM(2, 4, 2))
    model[2].weight.data[:4] = 0.0
    folder = saved(tmp_path, model, masks)
    whole = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    claimed = saving.read_config(folder).weights_sha256
    chance, errors, read = random.Random(0), [], 0
    monkeypatch.setattr(saved_files, "state_sha256", lambda state: claimed)
    for turn in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 8])):
            place = chance.randrange(header) if turn % 3 == 0 else chance.randrange(header, len(whole))
            damaged[place] ^= 1 << chance.randrange(8)
        (folder / "model.safetensors").write_bytes(damaged)
        forge(folder)
        module = network(torch.float16)
        try:
            loaded = compressor.load(folder, model=module)
        except CompressorError as error:
            errors.append(error)
            assert state_bits(module) == model_bits
            continue
        expected, _ = packing.packed_state(loaded.state_dict(), dict.fromkeys(masks, "2:2:4"))
        found = load_file(folder / "model.safetensors")
        assert {name: bits(value) for name, value in found.items()} == {n: bits(v) for n, v in expected.items()}
        read += 1
    assert all(error.hint and str(folder) in error.message for error in errors)
    assert len(errors) > 30 and read > 30
    monkeypatch.setattr(saved_files, "state_sha256", original)
    (folder / "model.safetensors").write_bytes(whole)
    forge(folder)
    assert state_bits(compressor.load(folder, model=network(torch.float16))) == state_bits(model)


def test_no_flipped_bit_of_the_config_gives_other_weights(folder):
    whole = (folder / "config.json").read_bytes()
    before = state_bits(compressor.load(folder, model=network(seed=1)))
    chance, read = random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        (folder / "config.json").write_bytes(damaged)
        forge(folder)
        try:
            loaded = compressor.load(folder, model=network(seed=1))
        except CompressorError:
            continue
        read += 1
        assert state_bits(loaded) == before
    assert read < 50
