"""The packed form of an N:M weight: the values that are kept, and where in its group each of them was.

Lossless and canonical: a weight has one packed form, and `unpack` refuses every other. Nothing but the weight decides
it, so masks are not needed. Plain torch on a CPU: a file is read wherever torch is. docs/design.md has the format for
readers in other languages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, MutableMapping
from math import prod

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from compressor.errors import CompressorError, said_of
from compressor.sparsity.notation import parse
from compressor.sparsity.pattern import NM
from compressor.weights import part_names

_CHUNK = 2**20  # entries of the weight at a time: temporaries stay small, and mostly in the cache
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MAX_ENTRY_BYTES = 128
"""A bound on what a second tensor adds to the header of a safetensors file, besides its name."""

_HINT = "The file is damaged, or was not written by this toolkit; use another copy."


def pack(weight: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """The values and the index of `weight` (out, in, *kernel), from which `unpack` makes it again, bit for bit.

    Values are (out, in / m * n, *kernel) in the weight's dtype: of each group of m along dim 1 the n that are kept, in
    their order. The index is flat uint8 and holds their places in the group, `index_bytes` long, once per v rows.
    Entries whose bits are all zero are dropped; where a group has fewer than n others, the first of them fill it up.
    Both are on the CPU. Raises CompressorError where the shape does not fit, or where a group holds more than n entries
    that are not +0.0: -0.0 is one, and would be lost.
    """
    if reason := pattern.misfit(tuple(weight.shape)):
        raise CompressorError(f"{pattern}: {reason}")
    words = _words(weight.cpu())
    if pattern.n == pattern.m:
        return words.clone().view(weight.dtype), torch.empty(0, dtype=torch.uint8)
    v = pattern.v
    values = torch.empty(_kept_shape(weight.shape, pattern), dtype=words.dtype)
    places = torch.empty((len(values) // v, *values.shape[1:]), dtype=_place_dtype(pattern))
    rows = _rows_at_once(weight.shape, v)
    parts = (torch.split(words, rows), torch.split(values, rows), torch.split(places, rows // v))
    for some, kept, place in zip(*parts, strict=True):
        groups = rearrange(some, "(o v) (g m) ... -> o v ... g m", v=v, m=pattern.m)
        chosen = _chosen((groups != 0).any(1).contiguous(), pattern)
        place.copy_(rearrange(chosen, "o ... g n -> o (g n) ..."))
        found = groups.gather(-1, chosen.unsqueeze(1).expand(*groups.shape[:-1], pattern.n))
        kept.copy_(rearrange(found, "o v ... g n -> (o v) (g n) ..."))
    return values.view(weight.dtype), _to_bits(places.flatten(), _width(pattern))


def unpack(values: Tensor, index: Tensor, pattern: NM) -> Tensor:
    """The weight (out, in, *kernel) whose packed form is `values` and `index`, on the CPU; +0.0 where nothing is kept.

    It is m / n times the size of `values`: ask `unpacked_shape` first where they are not trusted. Raises
    CompressorError where the two are not what `pack` writes: shapes, dtypes, places that are not ascending or lie
    outside of their group, another filling than the first free places, bits after the last place.
    """
    shape = unpacked_shape(tuple(values.shape), pattern)
    expected = index_bytes(shape, pattern)
    if index.dtype != torch.uint8 or tuple(index.shape) != (expected,):
        wrong = f"{tuple(index.shape)} of {index.dtype}"
        raise CompressorError(f"{pattern}: the index must be ({expected},) of torch.uint8, got {wrong}", _HINT)
    values, index, v = values.cpu(), index.cpu(), pattern.v
    words = _words(values)
    if pattern.n == pattern.m:
        return words.clone().view(values.dtype)
    places = _from_bits(index, _width(pattern), words.numel() // v, pattern)
    places = places.view(len(words) // v, *words.shape[1:])
    weight = torch.empty(shape, dtype=words.dtype)
    rows = _rows_at_once(shape, v)
    parts = (torch.split(weight, rows), torch.split(words, rows), torch.split(places, rows // v))
    for some, kept, place in zip(*parts, strict=True):
        chosen = rearrange(place, "o (g n) ... -> o ... g n", n=pattern.n).long()
        found = rearrange(kept, "(o v) (g n) ... -> o v ... g n", v=v, n=pattern.n)
        _check_places(chosen, found, pattern)
        groups = torch.zeros((*found.shape[:-1], pattern.m), dtype=words.dtype)
        groups.scatter_(-1, chosen.unsqueeze(1).expand_as(found), found)
        some.copy_(rearrange(groups, "o v ... g m -> (o v) (g m) ..."))
    return weight.view(values.dtype)


def unpacked_shape(values: tuple[int, ...], pattern: NM) -> tuple[int, ...]:
    """The shape of the weight whose values have the shape `values`; CompressorError where there is none."""
    shape = (values[0], values[1] // pattern.n * pattern.m, *values[2:]) if len(values) > 1 else values
    if len(values) > 1 and values[1] % pattern.n:
        raise CompressorError(f"{pattern}: values need dim 1 divisible by {pattern.n}, got {values}", _HINT)
    if reason := pattern.misfit(shape):
        raise CompressorError(f"{pattern}: values {values} unpack to {shape}: {reason}", _HINT)
    return shape


def index_bytes(shape: tuple[int, ...], pattern: NM) -> int:
    """The length of the index of a weight of `shape`: ceil(log2 m) bits per place; none where everything is kept."""
    return -(-prod(_kept_shape(shape, pattern)) // pattern.v * _width(pattern) // 8)


# --- A model's state: some weights packed, the rest plain. ---


def packed_state(
    state: Mapping[str, Tensor], patterns: Mapping[str, str], device: str = "cpu"
) -> tuple[dict[str, Tensor], list[str]]:
    """What a file holds of `state`, and the names of the weights that are packed in it. On the `device` "meta" the parts of those
    are only as large as they would be.

    A weight stays plain where its pattern (by name, as text) is not N:M, where its packed form is not smaller or cannot
    be exact, and where a part would have the name of another tensor.
    """
    tensors, packed = dict(state), []
    for name, text in patterns.items():
        pattern, weight = parse(text).grouped, state[name]
        if pattern is None or any(part in state for part in part_names(name)):
            continue
        kept, places = prod(_kept_shape(weight.shape, pattern)), index_bytes(tuple(weight.shape), pattern)
        added = places + _MAX_ENTRY_BYTES + len(json.dumps(name))
        if kept * weight.element_size() + added >= weight.nbytes:
            continue
        try:
            parts = [part.to(device) for part in pack(weight, pattern)]
        except CompressorError:  # a -0.0 too many, or a dtype without words
            continue
        del tensors[name]
        tensors.update(zip(part_names(name), parts, strict=True))
        packed.append(name)
    return tensors, packed


def rules(packed: Iterable[str], patterns: Mapping[str, str]) -> dict[str, NM]:
    """The patterns of the weights that are said to be packed; CompressorError where one has none that can be."""
    found: dict[str, NM] = {}
    for name in packed:
        pattern = parse(patterns[name]).grouped if name in patterns else None
        if pattern is None or name in found:
            how = "twice" if name in found else f"with the pattern {patterns.get(name)}"
            raise CompressorError(f"packed: {name} {how}", f"Allowed: a name once, with an N:M pattern. {_HINT}")
        found[name] = pattern
    return found


def unpacked_state(tensors: MutableMapping[str, Tensor], rules: Mapping[str, NM]) -> dict[str, Tensor]:
    """The plain state of a file's `tensors`, of which it takes out the parts. `rules`: the packed weights' patterns.

    Ask `unpacked_shapes` first whether the parts are there and how large the result is.
    """
    state = {}
    for name, pattern in rules.items():
        values, index = (tensors.pop(part) for part in part_names(name))
        with said_of(name):
            state[name] = unpack(values, index, pattern)
    return {**tensors, **state}


def unpacked_shapes(found: Mapping[str, tuple[int, ...]], rules: Mapping[str, NM]) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's state, from those of its tensors. Costs nothing: no tensor is read or made.

    Raises CompressorError where a part of a weight in `rules` is missing or has a shape that cannot be.
    """
    shapes = dict(found)
    for name, pattern in rules.items():
        if name in found:
            raise CompressorError(f"{name} should be packed, but is there as a plain tensor", _HINT)
        if lost := [part for part in part_names(name) if part not in found]:
            raise CompressorError(f"{name} should be packed, but {lost[0]} is missing", _HINT)
        values, index = (shapes.pop(part) for part in part_names(name))
        with said_of(name):
            shape = unpacked_shape(values, pattern)
            if index != (expected := (index_bytes(shape, pattern),)):
                raise CompressorError(f"{pattern}: the index must be {expected}, got {index}", _HINT)
        shapes[name] = shape
    return shapes


# --- Groups, places and bits. ---


def _words(tensor: Tensor) -> Tensor:
    """The bits of `tensor`, as whole numbers of the same size: zero is +0.0 alone, and every float dtype moves alike."""
    if tensor.element_size() not in _WORDS:
        raise CompressorError(f"{tensor.dtype} cannot be packed", "Use a dtype of at most 8 bytes.")
    return tensor.contiguous().view(_WORDS[tensor.element_size()])


def _chosen(alive: Tensor, pattern: NM) -> Tensor:
    """The n places to keep of each group, ascending: (o, ..., g, m) bool -> (o, ..., g, n) int64. Changes `alive`."""
    n, m = pattern.n, pattern.m
    count = alive.sum(-1, dtype=torch.int32)
    if bool((count > n).any()):
        raise CompressorError(f"not {pattern}: a group holds more than {n} entries other than +0.0", "Prune it first.")
    short = count < n
    if bool(short.any()):
        free = ~alive[short]
        alive[short] = ~free | (free.cumsum(-1) <= (n - count[short]).unsqueeze(-1))
    places = alive.view(-1).nonzero().view(-1, n) - torch.arange(0, alive.numel(), m).unsqueeze(-1)
    return places.view(*alive.shape[:-1], n)


def _check_places(chosen: Tensor, found: Tensor, pattern: NM) -> None:
    """Raise unless places (o, ..., g, n) of the values `found` (o, v, ..., g, n) are those that `_chosen` gives."""
    if bool((chosen[..., -1] >= pattern.m).any()):
        raise CompressorError(f"{pattern}: a place in the index lies outside of its group", _HINT)
    if bool((chosen[..., 1:] <= chosen[..., :-1]).any()):
        raise CompressorError(f"{pattern}: the places of a group in the index are not ascending", _HINT)
    # A filler is in the first free place: all places before it are kept, so that its own is the number of those.
    if bool(((found == 0).all(1) & (chosen != torch.arange(pattern.n))).any()):
        raise CompressorError(f"{pattern}: a group is filled up with another place than the first free one", _HINT)


def _to_bits(places: Tensor, width: int) -> Tensor:
    """Whole numbers below 2^width -> uint8: number i has bits i * width onwards, the lowest bit of a byte first."""
    eights = pad(places, (0, -len(places) % 8)).view(-1, 8)
    out = torch.zeros((len(eights), width), dtype=torch.uint8)
    for entry, byte, shift in _overlaps(width):
        column = eights[:, entry]
        out[:, byte] |= (column << shift if shift >= 0 else column >> -shift).bitwise_and_(255).to(torch.uint8)
    return out.flatten()[: -(-len(places) * width // 8)].clone()


def _from_bits(index: Tensor, width: int, count: int, pattern: NM) -> Tensor:
    """The inverse of `_to_bits` for `count` numbers."""
    rows = -(-count // 8)
    eights = torch.zeros((rows, 8), dtype=_place_dtype(pattern))
    columns = pad(index, (0, rows * width - len(index))).view(rows, width)
    for entry, byte, shift in _overlaps(width):
        column = columns[:, byte].to(eights.dtype)
        eights[:, entry] |= column >> shift if shift >= 0 else column << -shift
    places = eights.bitwise_and_(2**width - 1).flatten()
    if bool(places[count:].any()):
        raise CompressorError(f"{pattern}: the index has bits after its last place", _HINT)
    return places[:count]


def _overlaps(width: int) -> list[tuple[int, int, int]]:
    """Of 8 numbers in `width` bytes: (number, byte, how far left the number is moved to meet it) where they overlap."""
    found = [(entry, byte, entry * width - 8 * byte) for entry in range(8) for byte in range(width)]
    return [(entry, byte, shift) for entry, byte, shift in found if -width < shift < 8]


def _width(pattern: NM) -> int:
    """The bits of a place; 0 where nothing is dropped and places say nothing."""
    return 0 if pattern.n == pattern.m else (pattern.m - 1).bit_length()


def _place_dtype(pattern: NM) -> torch.dtype:
    return torch.uint8 if pattern.m <= 256 else torch.int32


def _kept_shape(shape: tuple[int, ...], pattern: NM) -> tuple[int, ...]:
    return (shape[0], shape[1] // pattern.m * pattern.n, *shape[2:])


def _rows_at_once(shape: tuple[int, ...], v: int) -> int:
    return max(1, _CHUNK // (v * prod(shape[1:]))) * v
