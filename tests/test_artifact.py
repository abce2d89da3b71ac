"""Saved folders: whole or not at all, read back byte for byte, and refused where a byte, a name or a zero is wrong."""

from __future__ import annotations

import copy
import errno
import gc
import hashlib
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import nn

import compressor
from compressor import NM, files, saving
from compressor.errors import CompressorError, UsageError
from compressor.plugins.magnitude import Magnitude
from compressor.saving.plain import apart, plain_state
from compressor.weights import weights_sha256


def raising(error):
    def fail(*_):
        raise error

    return fail


def pruned(model):
    """The masks of `model`, 2:4 by magnitude, after they have been applied."""
    masks = {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            masks[name] = NM(2, 4).mask(weight.detach().abs())
            weight.data = masks[name].apply(weight.data)
    return masks


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def folder(request, tmp_path, model):
    """A saved model without a name, with its weights packed and plain."""
    masks = pruned(model)
    compressor.save(tmp_path / "saved", model, masks, packed=request.param)
    return tmp_path / "saved"


only_plain = pytest.mark.parametrize("folder", [False], ids=["plain"], indirect=True)


def forge(folder):
    """Write the manifest that an honest writer of these very files would have written."""
    entries = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
        for path in folder.iterdir()
        if path.name != files.MANIFEST
    }
    (folder / files.MANIFEST).write_text(json.dumps({"schema_version": 1, "files": entries}))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def refused(model, *parts):
    """The block raises a CompressorError that says `parts`, within a second, and `model` stays as it was."""
    before = copy.deepcopy(model.state_dict())
    began = time.process_time()
    with pytest.raises(CompressorError) as caught:
        yield
    assert time.process_time() - began < 1
    for part in parts:
        assert str(part) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- Commit: all or nothing. ---


def written(text):
    return lambda folder: (folder / "file.txt").write_text(text) and None


def test_a_commit_replaces_a_folder_and_leaves_nothing_beside_it(tmp_path):
    files.commit(tmp_path / "target", written("old"))
    files.commit(tmp_path / "target", written("new"))
    assert (tmp_path / "target" / "file.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    files.verify(tmp_path / "target")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_leaves_the_old_folder_and_no_leftovers(tmp_path, code):
    def fails(folder):
        (folder / "file.txt").write_text("x" * 1000)
        raise OSError(code, "disk trouble")

    files.commit(tmp_path / "target", written("old"))
    with pytest.raises(CompressorError, match=r"disk trouble \(1,000 bytes written so far, [\d,]+ bytes free\)"):
        files.commit(tmp_path / "target", fails)
    assert (tmp_path / "target" / "file.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    files.verify(tmp_path / "target")


def test_a_first_commit_that_fails_leaves_nothing(tmp_path):
    def fails(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CompressorError, match="No space left"):
        files.commit(tmp_path / "target", fails)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CompressorError, match="cannot be written"):
        files.commit(tmp_path / "file" / "target", written("new"))
    assert (tmp_path / "file").read_text() == "mine"


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize(("method", "call"), [("rename", 0), ("rename", 1), *(("sync", n) for n in range(4))])
def test_a_crash_and_a_full_disk_after_it_lose_nothing(tmp_path, monkeypatch, method, call):
    files.commit(tmp_path / "target", written("old"))
    home = Path if method == "rename" else files
    original, calls = getattr(home, method), []

    def dies(*arguments):
        calls.append(1)
        if len(calls) > call:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(home, method, dies)
        with pytest.raises(Killed):
            files.commit(tmp_path / "target", written("new"))

    def fails(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CompressorError):
        files.commit(tmp_path / "target", fails)
    assert (tmp_path / "target" / "file.txt").read_text() in ("old", "new")
    files.verify(tmp_path / "target")


def test_the_files_are_readable_by_others(folder):
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "manifest.json"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


# --- Verify: every byte, and only in the folder. ---


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_truncated_at_any_length_is_found(folder, model, name):
    whole = (folder / name).read_bytes()
    for length in {0, 1, len(whole) // 2, len(whole) - 1}:
        (folder / name).write_bytes(whole[:length])
        with refused(model, folder / name, "not those that were saved"):
            compressor.load(folder, model=model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_found(folder, model, name):
    whole = bytearray((folder / name).read_bytes())
    for position in range(0, len(whole), max(1, len(whole) // 20)):
        damaged = whole.copy()
        damaged[position] ^= 1 << position % 8
        (folder / name).write_bytes(damaged)
        with refused(model, folder / name):
            compressor.load(folder, model=model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_missing_file_is_named(folder, model, name):
    (folder / name).unlink()
    with refused(model, folder / name):
        compressor.load(folder, model=model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_the_manifest_does_not_list_is_not_trusted(folder, model, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with refused(model, name):
        compressor.load(folder, model=model)


def test_structure_that_the_manifest_does_not_list_is_not_carried_out(folder, model):
    (folder / "surgery.json").write_text("{}")
    with refused(model, folder / "manifest.json", "surgery.json is not listed"):
        compressor.load(folder, model=model)


@pytest.mark.parametrize(
    "name", ["../outside", "{parent}/outside", "a/../../outside", "a\0b", "", ".", "x" * 300, "\ud800"]
)
def test_a_path_that_is_no_file_of_the_folder_is_refused(folder, model, name):
    outside = folder.parent / "outside"
    outside.write_text("secret")
    name = name.format(parent=folder.parent)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size": 6}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with refused(model):
        compressor.load(folder, model=model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_symlink_out_of_the_folder_is_refused(folder, model, name):
    (folder / name).rename(folder.parent / "outside")
    (folder / name).symlink_to(folder.parent / "outside")
    with refused(model, name):
        compressor.load(folder, model=model)


def test_a_symlinked_folder_is_refused(folder):
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    (folder / "sub").symlink_to(outside)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["sub/file"] = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size": 6}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CompressorError):
        files.verify(folder)


HOSTILE_MANIFESTS = {
    "empty": b"",
    "binary": b"\x80\x00\xff",
    "a list": b"[]",
    "files a list": b'{"schema_version": 1, "files": []}',
    "newer": b'{"schema_version": 2, "files": {}}',
    "NaN": b'{"schema_version": NaN, "files": {}}',
    "deep": b'{"files": ' + b"[" * 100_000,
    "entry": b'{"schema_version": 1, "files": {"config.json": 3}}',
    "many digits": b'{"schema_version": ' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("text", HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_refused(folder, model, text):
    (folder / "manifest.json").write_bytes(text)
    with refused(model, folder):
        compressor.load(folder, model=model)


# --- What a consistent manifest does not save. ---


@only_plain
def test_one_weight_that_was_pruned_and_is_not_zero_is_found(folder, model):
    state = load_file(folder / "model.safetensors")
    weight = state["0.weight"]
    row, column = (weight == 0).nonzero()[0].tolist()
    weight[row, column] = 1e-30
    save_file(state, folder / "model.safetensors")
    forge(folder)
    with refused(model, "0.weight", "2:4"):
        compressor.load(folder, model=model)


def test_other_weights_than_the_config_says_are_found(folder, model):
    state = load_file(folder / "model.safetensors")
    state["0.bias"] += 1
    save_file(state, folder / "model.safetensors")
    forge(folder)
    with refused(model, "sha256"):
        compressor.load(folder, model=model)


def test_numbers_of_another_kind_are_not_loaded(folder, model):
    state = load_file(folder / "model.safetensors")
    state["0.bias"] = state["0.bias"].long()
    save_file(state, folder / "model.safetensors")
    forge(folder)
    with refused(model, folder / "model.safetensors", "0.bias is torch.int64, the model's torch.float32"):
        compressor.load(folder, model=model)


def test_weights_that_are_not_finite_are_not_loaded(folder, model):
    state = load_file(folder / "model.safetensors")
    state["0.bias"][0] = float("inf")
    save_file(state, folder / "model.safetensors")
    forge(folder)
    with refused(model, "0.bias"):
        compressor.load(folder, model=model)


def test_a_saved_model_names_no_code(folder, model, tmp_path, cli, monkeypatch):
    """Loading it by its name ran the file, and so did a run that began with it."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("open('was_run', 'w')\ndef Mine(): pass\n")
    config = json.loads((folder / "config.json").read_text())
    for name in ("mine.py:Mine", str(tmp_path / "mine.py:Mine")):
        (folder / "config.json").write_text(json.dumps({**config, "model": name}))
        forge(folder)
        with pytest.raises(CompressorError, match="is a file of code, not a registered model\nLoad it in Python"):
            compressor.load(folder)
        outcome = cli("run", "--weights", folder, "--out", "run")
        assert outcome.code == 1 and "is a file of code" in outcome.err
        assert weights_sha256(compressor.load(folder, model)) == config["weights_sha256"]
        with pytest.raises(UsageError, match=r"name: .*mine\.py:Mine.*\nGive that of a registered model"):
            compressor.save(tmp_path / "other", model, {}, name=name)
    assert not Path("was_run").exists() and not Path("run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"sorcery": 1},
        {"schema_version": "1"},
        {"schema_version": 2},
        {"patterns": ["2:4"]},
        {"patterns": {"0.weight": 2}},
        {"patterns": {"0.weight": "2 of 4"}},
        {"patterns": {"0.weight": "1:99999999999999999999"}},
        {"patterns": {"head.weight": "2:4"}},
        {"model": 3},
        {"model": "../uvit"},
        {"weights_sha256": None},
        {"packed": "0.weight"},
        {"packed": [3]},
        {"packed": None},
        {"packed": ["0.weight", "2.weight", "0.weight"]},
        {"packed": ["0.bias"]},
        {"packed": ["head.weight"]},
        {"packed": ["0.weight", "2.weight"], "patterns": {"0.weight": "2 of 4", "2.weight": "2:4"}},
        {"packed": ["0.weight", "2.weight"], "patterns": {"0.weight": "unstructured:0.5", "2.weight": "2:4"}},
        {"packed": ["0.weight", "2.weight"], "patterns": {"0.weight": "1:999999", "2.weight": "2:4"}},
    ],
)
def test_a_config_that_is_not_ours_is_refused(folder, model, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    forge(folder)
    with refused(model, folder if "../uvit" not in change.values() else "../uvit"):
        compressor.load(folder, model=None if "../uvit" in change.values() else model)


HOSTILE_CONFIGS = {
    "binary": b"\x80\x00\xff",
    "empty": b"",
    "a list": b"[1]",
    "NaN": b'{"schema_version": NaN}',
    "infinity": b'{"schema_version": -Infinity}',
    "deep": b'{"model": ' + b'{"a": ' * 100_000,
    "huge": b" " * (17 * 1024 * 1024),
    "many digits": b'{"schema_version": ' + b"9" * 100_000 + b"}",
    "many layers": json.dumps(
        {
            "schema_version": 1,
            "model": None,
            "weights_sha256": "",
            "patterns": dict.fromkeys(map(str, range(50_000)), "2:4"),
        }
    ).encode(),
}


@pytest.mark.parametrize("text", HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS)
def test_a_hostile_config_is_refused_at_once(folder, model, text):
    (folder / "config.json").write_bytes(text)
    forge(folder)
    with refused(model, folder):
        compressor.load(folder, model=model)


def header(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


HOSTILE_SAFETENSORS = {
    "huge header": (1 << 60).to_bytes(8, "little") + b"{}",
    "truncated header": header(b'{"0.weight":')[:-4],
    "no data": header(b'{"0.weight":{"dtype":"F32","shape":[32,16],"data_offsets":[0,2048]}}'),
    "overlap": header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        b"\0" * 12,
    ),
    "huge shape": header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}'),
    "pickle": b"\x80\x04\x95" + b"\0" * 40,
    "shape beyond 63 bits": header(b'{"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'),
}


@pytest.mark.parametrize("data", HOSTILE_SAFETENSORS.values(), ids=HOSTILE_SAFETENSORS)
def test_hostile_safetensors_are_refused(folder, model, data):
    (folder / "model.safetensors").write_bytes(data)
    forge(folder)
    with refused(model, folder / "model.safetensors"):
        compressor.load(folder, model=model)


FOUR_BITS = header(
    b'{"0.bias":{"dtype":"F4","shape":[32],"data_offsets":[0,16]},'
    b'"0.weight":{"dtype":"F4","shape":[32,16],"data_offsets":[16,272]},'
    b'"2.bias":{"dtype":"F4","shape":[16],"data_offsets":[272,280]},'
    b'"2.weight":{"dtype":"F4","shape":[16,32],"data_offsets":[280,536]}}',
    b"\0" * 536,
)


@only_plain
def test_numbers_that_cannot_be_checked_are_not_loaded(folder, model):
    (folder / "model.safetensors").write_bytes(FOUR_BITS)
    forge(folder)
    with refused(model, folder):
        compressor.load(folder, model=model)


# --- Save and load. ---


def test_what_is_loaded_is_what_was_saved_in_eval_mode(folder, model):
    fresh = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    loaded = compressor.load(folder, model=fresh)
    assert loaded is fresh
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_module_of_another_width_is_left_alone_and_the_differences_named(folder):
    wide = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    with refused(wide, "0.weight: file has (32, 16), model has (64, 16)", "2.weight"):
        compressor.load(folder, model=wide)


def test_a_model_saved_without_a_name_needs_the_module(folder):
    with pytest.raises(CompressorError, match="without a model name") as caught:
        compressor.load(folder)
    assert "model=" in caught.value.hint


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(CompressorError, match="nowhere"):
        compressor.load(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, model, value):
    compressor.save(tmp_path / "saved", model, {})
    before = contents(tmp_path / "saved")
    model[2].bias.data[3] = value
    with pytest.raises(CompressorError, match=r"2\.bias"):
        compressor.save(tmp_path / "saved", model, {})
    assert contents(tmp_path / "saved") == before


def test_numbers_that_cannot_be_checked_are_not_saved(tmp_path, model):
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        pytest.skip("this torch has no 4-bit floats")
    model.register_buffer("scales", torch.zeros(4, dtype=torch.uint8).view(dtype))
    with pytest.raises(CompressorError, match=r"scales is torch\.float4"):
        compressor.save(tmp_path / "saved", model, {})
    assert not (tmp_path / "saved").exists()


def test_weights_that_break_their_mask_are_not_saved(tmp_path, model):
    masks = pruned(model)
    model[0].weight.data.fill_(1.0)
    with pytest.raises(CompressorError, match=r"0\.weight.*2:4"):
        compressor.save(tmp_path / "saved", model, masks)
    assert not (tmp_path / "saved").exists()


def test_tied_weights_stay_tied(tmp_path):
    def tied():
        module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        module[1].weight = module[0].weight
        return module

    model = tied()
    compressor.save(tmp_path / "saved", model, pruned(model))
    loaded = compressor.load(tmp_path / "saved", model=tied())
    assert loaded[1].weight is loaded[0].weight
    assert torch.equal(loaded[0].weight, model[0].weight)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_comes_back_bit_for_bit(tmp_path, model, dtype, packed):
    model = model.to(dtype)
    compressor.save(tmp_path / "saved", model, pruned(model), packed=packed)
    loaded = compressor.load(tmp_path / "saved", model=copy.deepcopy(model))
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], value)


# --- State: checkpoints. ---

SHAPES = st.sampled_from([(), (0,), (3,), (2, 3), (2, 0, 3)])
TENSORS = st.builds(
    lambda shape, dtype: (torch.arange(torch.Size(shape).numel()).reshape(shape) % 2 * 3).to(dtype),
    SHAPES,
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | TENSORS
)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


def same(first, second):
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list):
        return isinstance(second, list) and len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(st.text(), TREES, max_size=3))
def test_a_state_comes_back_as_it_was(tmp_path, state):
    saving.save_state(tmp_path, state)
    assert same(state, saving.load_state(tmp_path))


def test_numbered_keys_come_back_as_text_and_tuples_as_lists(tmp_path):
    saving.save_state(tmp_path, {"a": {0: (1, 2)}})
    assert saving.load_state(tmp_path) == {"a": {"0": [1, 2]}}


@pytest.mark.parametrize("value", [float("inf"), float("nan"), {1, 2}, {"$tensor": 3}])
def test_what_would_not_come_back_is_refused_before_it_is_saved(tmp_path, value):
    try:
        files.commit(tmp_path / "state", lambda folder: saving.save_state(folder, {"pruner": {"best": value}}))
    except CompressorError:
        assert list(tmp_path.iterdir()) == []
    else:
        assert repr(saving.load_state(tmp_path / "state")["pruner"]["best"]) == repr(value)


def test_views_of_one_tensor_are_stored_apart(tmp_path):
    whole = torch.arange(6.0)
    saving.save_state(tmp_path, {"whole": whole, "part": whole[2:4], "transposed": whole.view(2, 3).T})
    loaded = saving.load_state(tmp_path)
    assert same(loaded, {"whole": whole, "part": whole[2:4], "transposed": whole.view(2, 3).T})


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="what a process has mapped is told on Linux alone")
def test_a_state_that_was_read_does_not_keep_its_file(tmp_path):
    """A mapped file that is deleted takes its place on the disk until the mapping ends: a resumed run would need one more."""
    saving.save_state(tmp_path, {"optimizer": [torch.ones(1 << 18)]})
    gc.disable()
    try:
        loaded = saving.load_state(tmp_path)
        mapped = Path("/proc/self/maps").read_text()
    finally:
        gc.enable()
    assert str(tmp_path) not in mapped
    assert loaded["optimizer"][0].sum() == 1 << 18
    assert saving.load_state(tmp_path, mapped=True)["optimizer"][0].sum() == 1 << 18
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_what_is_written_is_copied_only_where_it_has_to_be():
    whole, lone = torch.arange(6.0), nn.Parameter(torch.ones(2, 2))
    given = {"lone": lone, "whole": whole, "part": whole[2:4], "again": whole, "turned": whole.view(2, 3).T}
    given |= {"empty": torch.empty(0), "number": torch.tensor(1.0), "one": torch.tensor([2.0]).expand(3)}
    made = apart(given)
    assert all(torch.equal(made[name], value) for name, value in given.items())
    assert [name for name in made if made[name].data_ptr() == given[name].data_ptr()][:2] == ["lone", "whole"]
    assert len({one.untyped_storage().data_ptr() for one in made.values() if one.numel()}) == len(given) - 1
    assert save(made) == save({name: value.detach().clone().contiguous() for name, value in given.items()})


def test_a_folder_that_is_no_saved_model_is_not_replaced(tmp_path, model):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.txt").write_text("mine")
    with pytest.raises(CompressorError, match="not a saved model"):
        compressor.save(tmp_path / "thesis", model, {})
    assert (tmp_path / "thesis" / "text.txt").read_text() == "mine"


def test_a_model_with_other_files_beside_it_is_not_replaced(folder, model):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CompressorError, match=r"holds notes\.txt, which is no file of a saved model"):
        compressor.save(folder, model, {})
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    (folder / "surgery.json").write_text("{}")  # of another model
    compressor.save(folder, model, {})
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "manifest.json"}


def test_a_folder_that_is_write_protected_or_may_not_be_read_is_named(folder, model, monkeypatch):
    """What was replaced could not be removed, and the save after the next one failed for ever."""
    denied = OSError(errno.EACCES, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(CompressorError, match="is write-protected\nChoose another folder, or allow it"):
            compressor.save(folder, model, {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", raising(denied))
        for ask in (lambda: compressor.save(folder, model, {}), lambda: compressor.load(folder, model)):
            with pytest.raises(CompressorError, match="saved': Permission denied"):
                ask()
    compressor.load(folder, model)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "facts.txt"
    path.write_text("old", encoding="utf-8")

    def break_off() -> None:
        with files.replacing(path) as partial:
            partial.write_text("ne", encoding="utf-8")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        break_off()
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]
    with files.replacing(path) as partial:
        partial.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new" and list(tmp_path.iterdir()) == [path]


class Holding(nn.Module):
    """A model that calls a part of itself `module`, as wrappers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("inner", [False, True])
def test_masks_by_the_names_of_a_wrapped_model_are_of_its_own_weights(tmp_path, model, inner):
    model = Holding(model) if inner else model
    wrapped = nn.DataParallel(torch.compile(model))
    names = {name: value for name, value in wrapped.named_parameters() if value.dim() == 2}
    assert all(name.startswith("module._orig_mod.") for name in names)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    masks = compressor.Shadow(names, Magnitude(), optimizer).masks
    for number, saved in enumerate((wrapped, model)):
        compressor.save(tmp_path / str(number), saved, masks)
        config = files.read_json(tmp_path / str(number) / "config.json")
        assert set(config["patterns"]) == {name for name, value in model.named_parameters() if value.dim() == 2}


def test_a_mask_of_no_weight_is_named_and_nothing_is_called_damaged(tmp_path, model):
    mask = pruned(model)["0.weight"]
    with pytest.raises(
        CompressorError, match=r"a mask is of '0.wieght', which is no weight of this Sequential\n.*'0.weight'"
    ):
        compressor.save(tmp_path / "saved", model, {"0.wieght": mask})
    with pytest.raises(CompressorError, match=r"two masks are of 0.weight"):
        compressor.save(tmp_path / "saved", model, {"0.weight": mask, "module.0.weight": mask})
    assert not (tmp_path / "saved").exists()


def test_a_mask_may_have_any_name_of_a_tied_weight(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    mask = Magnitude().masks({"0.weight": model[0].weight.detach()}, 1.0, {})["0.weight"]
    model[0].weight.data.mul_(mask.keep)
    compressor.save(tmp_path / "saved", model, {"1.weight": mask})
    assert files.read_json(tmp_path / "saved" / "config.json")["patterns"] == {"0.weight": "2:4"}


def linked(tmp_path):
    """A link from one folder to a place in another."""
    (tmp_path / "store").mkdir()
    (tmp_path / "home").mkdir()
    link = tmp_path / "home" / "current"
    link.symlink_to("../store/v1")
    return link, tmp_path / "store" / "v1"


def test_saving_to_a_link_replaces_what_it_leads_to_and_nothing_comes_back(tmp_path, model):
    link, behind = linked(tmp_path)
    masks = pruned(model)
    for number in (1.0, 2.0):  # the link dangles at first
        model[0].bias.data.fill_(number)
        compressor.save(link, model, masks)
        assert link.is_symlink() and [path.name for path in (tmp_path / "home").iterdir()] == ["current"]
        assert [path.name for path in (tmp_path / "store").iterdir()] == ["v1"]
        for path in (link, behind):
            assert compressor.load(path, copy.deepcopy(model))[0].bias[0].item() == number
    link.unlink()
    with pytest.raises(CompressorError):
        compressor.load(link, model)


def test_what_was_being_replaced_behind_a_link_is_put_back(tmp_path, model):
    link, behind = linked(tmp_path)
    compressor.save(link, model, pruned(model))
    behind.rename(behind.with_name(".old-v1"))  # as a writer that dies leaves it
    compressor.load(link, model)
    assert link.is_symlink() and behind.is_dir()


def test_a_link_of_an_earlier_version_is_no_former_model(tmp_path, model):
    compressor.save(tmp_path / "v1", model, pruned(model))
    (tmp_path / ".old-current").symlink_to("v1")
    with pytest.raises(CompressorError):
        compressor.load(tmp_path / "current", model)
    compressor.save(tmp_path / "current", model, pruned(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    link, behind = linked(tmp_path)
    for text in ("one", "two"):
        files.write_text(link, text)
        assert link.is_symlink() and behind.read_text() == link.read_text() == text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free some space"),
        (OSError(errno.EFBIG, "File too large"), r"raise the limit \(ulimit -f\)"),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), "raise the limit"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "Free some space"),
        (OSError(errno.ENOTDIR, "Not a directory"), "Choose another folder, which can be written to; what"),
        (OSError(errno.EEXIST, "File exists"), "Choose another folder, which can be written to; what"),
    ],
)
def test_what_to_do_is_said_by_what_went_wrong(tmp_path, error, said):
    def failing(folder):
        raise error

    with pytest.raises(CompressorError, match=said) as found:
        files.commit(tmp_path / "out", failing)
    assert ("Free some space" in str(found.value)) == ("No space" in str(error))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"path": "x" * 300}, "'xxx.*: File name too long"),
        ({"path": "a\0b"}, r"'a\\x00b': .*null"),
        ({"path": None}, "path: a NoneType"),
        ({"path": b"saved"}, "path: a bytes"),
        ({"masks": [1]}, "masks: a list"),
        ({"masks": {"0.weight": torch.ones(1)}}, "masks: '0.weight' has a Tensor"),
        ({"name": 3}, "name: a int"),
        ({"model": "a model"}, "a str is no module"),
        ({"architecture": [1]}, "architecture: no mapping"),
        ({"architecture": {"x": [1, {"y": float("nan")}]}}, "architecture.x.1.y: nan"),
        ({"architecture": {"x": object()}}, "architecture.x: a object"),
        ({"architecture": {"x": {1: 2}}}, "architecture.x: the key 1"),
        ({"architecture": {"x": "\ud800"}}, r"architecture.x: '\\ud800'"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, model, monkeypatch, changed, said):
    monkeypatch.chdir(tmp_path)
    arguments = {"path": "saved", "model": model, "masks": pruned(model), **changed}
    with pytest.raises(CompressorError, match=said):
        compressor.save(**arguments)
    assert not list(tmp_path.iterdir())
    if "path" in changed:
        with pytest.raises(CompressorError, match=said):
            compressor.load(arguments["path"], model)


def test_an_architecture_is_read_as_it_was_saved(tmp_path, model):
    architecture = {"a": {"b": [1, 2.5, None, True, "ä"]}}
    compressor.save(tmp_path / "saved", model, pruned(model), architecture=architecture)
    assert saving.read_config(tmp_path / "saved").architecture == architecture


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("odd", torch.ones(2, dtype=torch.complex128), "odd is torch.complex128"),
        ("odd", torch.eye(2).to_sparse(), "odd(: stored as| is) torch.sparse_coo"),
        ("__metadata__", torch.ones(2), "called '__metadata__'"),
        ("\ud800", torch.ones(2), r"called '\\ud800'"),
    ],
    ids=["complex128", "sparse", "metadata", "half a character"],
)
def test_a_tensor_that_no_file_can_hold_is_named_before_anything_is_written(tmp_path, name, value, said):
    model = nn.Module()
    model.register_buffer(name, value)
    with pytest.raises(CompressorError, match=said):
        compressor.save(tmp_path / "saved", model, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(CompressorError, match=said):
        plain_state(model)  # of which reports tell the size


@pytest.mark.parametrize(
    ("found", "own"),
    [
        (torch.tensor([1e300], dtype=torch.float64), torch.float32),
        (torch.tensor([1e30]), torch.float16),
        (torch.tensor([1e30]), torch.float8_e4m3fn),  # which takes 448 for it
        (torch.tensor([300]), torch.uint8),
        (torch.tensor([-1]), torch.bool),
    ],
    ids=str,
)
def test_numbers_that_the_model_cannot_hold_are_refused(tmp_path, found, own):
    saved, model = nn.Module(), nn.Module()
    saved.register_buffer("x", found)
    model.register_buffer("x", torch.zeros(1, dtype=own))
    compressor.save(tmp_path / "saved", saved, {})
    with pytest.raises(CompressorError, match="saved: x: "):
        compressor.load(tmp_path / "saved", model)
    assert not model.x.float().any()
    saved.x.copy_(torch.tensor([1]))  # which all of them are
    compressor.save(tmp_path / "saved", saved, {})
    assert float(compressor.load(tmp_path / "saved", model).x) == 1


def test_a_buffer_whose_entries_share_memory_is_loaded_into_memory_of_its_own(tmp_path):
    class Expanded(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("mean", torch.zeros(1).expand(5))
            self.register_buffer("same", self.mean)

    torch.manual_seed(0)
    first, second = Expanded(), Expanded()
    compressor.save(tmp_path / "saved", first, {})
    loaded = compressor.load(tmp_path / "saved", model=second)
    assert torch.equal(loaded.linear.weight, first.linear.weight) and torch.equal(loaded.mean, first.mean)
    assert loaded.same is loaded.mean and loaded.mean.is_contiguous()


def test_a_name_that_makes_no_model_by_itself_says_what_else_to_give(tmp_path):
    model = nn.Linear(4, 4)
    compressor.save(tmp_path / "saved", model, {}, name="diffusers")
    with pytest.raises(CompressorError, match=r"saved: diffusers names no model by itself\nGive the module: load"):
        compressor.load(tmp_path / "saved")
    compressor.load(tmp_path / "saved", model=nn.Linear(4, 4))
