"""ONNX files: they answer as PyTorch does, keep their zeros or leave them out, and exist only where that was checked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import compressor
from compressor import NM, Adapter, CompressorError, registry
from compressor.adapter import tensors_of
from compressor.data.calls import joined
from compressor.errors import GateError, UsageError
from compressor.export import graph as onnx_graph
from compressor.export import int8
from compressor.export import onnx as exports
from compressor.export.onnx import OnnxRunner, export_onnx, random_inputs
from compressor.export.tensorrt import export_tensorrt
from compressor.lower.units import pattern_of
from compressor.weights import state_sha256, weights_sha256

pytestmark = pytest.mark.xdist_group("export")
"""The models of this file are exported once, not once for each worker."""

WIDE = NM(2, 4, 96)  # V divides every width of the bundled model


class Feedforward(nn.Module):
    """Conditioned on a number and a class for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.label = nn.Linear(16, 64), nn.Linear(64, 16), nn.Embedding(10, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.mlp(x + t[:, None, None].cos() + self.label(y)[:, None])

    def mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class FeedforwardAdapter(Adapter):
    name, num_classes = "feedforward", 10

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        out: Tensor = module(inputs["x"], *inputs["rest"][0], inputs["rest"][1])
        return out

    def example_inputs(self, batch_size: int) -> Any:
        zeros = torch.zeros(batch_size, dtype=torch.int64)
        return {"x": torch.zeros(batch_size, 3, 16), "rest": [(torch.ones(batch_size),), zeros, None]}


def sparsify(model: nn.Module, patterns: dict[str, NM]) -> nn.Module:
    with torch.no_grad():
        for name, pattern in patterns.items():
            weight = model.get_parameter(name)
            weight.copy_(pattern.mask(weight.abs()).apply(weight))
    return model


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return sparsify(Feedforward(), {"fc1.weight": NM(2, 4, 64), "fc2.weight": NM(2, 4)}).eval()


@pytest.fixture(scope="module")
def digits():
    """The bundled model's adapter, and the model with 96:2:4 weights."""
    adapter = registry.adapter("uvit-digits")
    model = adapter.load(None)
    names = [
        n
        for n, _ in model.named_parameters()
        if n.endswith(("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight"))
    ]
    return adapter, sparsify(model, dict.fromkeys(names, WIDE)), dict.fromkeys(names, WIDE)


@pytest.fixture(scope="module", params=["dense", "gathered"])
def exported(request, digits, tmp_path_factory):
    adapter, model, patterns = digits
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    return export_onnx(model, adapter, path, form=request.param, patterns=patterns)


def constants(path) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


# --- The bundled model. ---


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_file_answers_as_pytorch_at_any_batch_and_timestep(digits, exported, batch):
    adapter, model, _ = digits
    rng = torch.Generator().manual_seed(batch)
    inputs = torch.randn(batch, 1, 8, 8, generator=rng), 999 * torch.rand(batch, generator=rng), None
    with torch.no_grad():
        wanted = adapter.predict(model, inputs)
    assert (OnnxRunner(exported.path)(inputs) - wanted).abs().max() <= 1e-4 * wanted.std()


def test_what_is_returned_is_true_of_the_file(digits, exported):
    assert [path.name for path in exported.path.parent.iterdir()] == ["model.onnx"]
    assert exported.size_bytes == exported.path.stat().st_size
    assert exported.inputs == {"sample": ("batch", 1, 8, 8), "timestep": ("batch",)}
    assert exported.weights_sha256 == weights_sha256(digits[1])
    assert 0 < exported.parity.max_error <= exported.parity.tolerance == 1e-4
    graph = onnx.load(exported.path)
    onnx.checker.check_model(graph)
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [exported.opset]
    metadata = {one.key: one.value for one in graph.metadata_props}
    assert (metadata["compressor.form"], metadata["compressor.weights_sha256"]) == (
        exported.form,
        exported.weights_sha256,
    )
    assert b"site-packages" not in exported.path.read_bytes()


def test_the_dense_form_keeps_the_zeros_and_the_gathered_form_leaves_them_out(digits, exported):
    _, model, patterns = digits
    stored = list(constants(exported.path).values())
    for name in patterns:
        weight = model.get_parameter(name).detach()
        kept = any(np.array_equal(array, weight.numpy()) or np.array_equal(array, weight.T.numpy()) for array in stored)
        assert kept == (exported.form == "dense"), name
    floats = sum(array.size for array in stored if array.dtype == np.float32)
    masked = sum(model.get_parameter(name).numel() for name in patterns)
    everything = sum(p.numel() for p in model.parameters())
    expected = everything if exported.form == "dense" else everything - masked // 2
    assert expected <= floats <= expected + 1000  # and what the graph computes with, such as frequencies
    assert set(exported.gathered) == (set(patterns) if exported.form == "gathered" else set())
    assert exported.left == {}


# --- Inputs. ---


def test_inputs_of_any_nesting_get_names(small, tmp_path):
    done = export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx")
    assert list(done.inputs) == ["x", "timestep", "label"]  # where it lies in a dict, a tensor has its key
    named = export_onnx(small, FeedforwardAdapter(), tmp_path / "b.onnx", input_names=["x", "time", "class"])
    assert list(named.inputs) == ["x", "time", "class"]
    for wrong in (["x", "x", "class"], ["x", "", "class"], ["x", "prediction", "class"]):
        with pytest.raises(UsageError, match="input_names"):
            export_onnx(small, FeedforwardAdapter(), tmp_path / "c.onnx", input_names=wrong)


def test_numbers_are_no_label_and_nested_keys_are_names():
    x, t = torch.ones(2, 3), torch.ones(2)
    called = [
        ((x,), {"timestep": t, "guidance": t, "more": {"text": x, "timestep": x}}, (2, 3))
    ]  # as calls are recorded
    found = onnx_graph.input_names_of(called, None)
    assert found == ["sample", "timestep", "guidance", "text", "input_4"]
    assert onnx_graph.input_names_of((x, t, t, t.long()), None) == ["sample", "timestep", "input_2", "label"]
    assert onnx_graph.input_names_of({"prediction": x, "input_0": x, "": t}, None) == ["input_1", "input_0", "input_2"]


@pytest.mark.parametrize("keys", [("fc1.weight", "linear", "gelu"), ("model.fc1.weight", "add", "cos")])
def test_an_input_may_have_the_name_of_a_value_inside(small, tmp_path, keys):
    """The graph had two values of one name, which ONNX Runtime refused."""

    class Named(FeedforwardAdapter):
        def predict(self, module: nn.Module, inputs: Any) -> Tensor:
            out: Tensor = module(*inputs.values())
            return out

        def example_inputs(self, batch_size: int) -> Any:
            return dict(zip(keys, tensors_of(super().example_inputs(batch_size)), strict=True))

    done = export_onnx(small, Named(), tmp_path / "a.onnx")
    assert tuple(done.inputs) == keys
    onnx.checker.check_model(onnx.load(done.path), full_check=True)


def test_random_inputs_vary_and_stay_in_range():
    example = FeedforwardAdapter().example_inputs(200)
    drawn = random_inputs(example, 10, torch.Generator().manual_seed(0))
    (time,), label, none = drawn["rest"]
    assert none is None
    assert drawn["x"].std() > 0.9
    assert time.min() >= 0 and 1.5 < time.max() <= 2 and len(time.unique()) == 200
    assert set(label.tolist()) == set(range(10))


def test_the_same_model_gives_the_same_bytes_and_stays_as_it_was(small, tmp_path):
    before = state_sha256(small.state_dict())
    done = [export_onnx(small, FeedforwardAdapter(), tmp_path / f"{n}.onnx").sha256 for n in range(2)]
    assert done[0] == done[1]
    assert state_sha256(small.state_dict()) == before
    assert all(parameter.requires_grad for parameter in small.parameters())


# --- The gathered form. ---


def test_of_a_pair_one_layer_may_be_gathered_alone(small, tmp_path):
    done = export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx", form="gathered")
    assert done.gathered == ("fc1.weight",)
    assert "V = 64" in done.left["fc2.weight"]
    assert done.left.keys() == {"fc2.weight"}
    lines = "\n".join(done.lines())
    assert "1 of 2 pruned layers" in lines and "fc2.weight" in lines


# --- Gates. ---


@pytest.fixture
def corrupted(monkeypatch):
    """`corrupted(change)` lets `change` alter the named constant arrays of every graph that is made."""

    def installed(change) -> None:
        def broken(*arguments: Any) -> onnx.ModelProto:
            graph = onnx_graph.graph_of(*arguments)
            for one in graph.graph.initializer:
                array = numpy_helper.to_array(one).copy()
                if array.dtype == np.float32 and array.ndim == 2:
                    one.CopyFrom(numpy_helper.from_array(change(array), one.name))
            return graph

        monkeypatch.setattr(exports, "graph_of", broken)

    return installed


@pytest.mark.parametrize("form", ["dense", "gathered"])
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_graph_that_answers_otherwise_is_not_kept(small, tmp_path, corrupted, form, factor):
    corrupted(lambda array: np.where(array == 0, array, np.float32(factor) * array))
    with pytest.raises(GateError, match="differs from PyTorch") as caught:
        export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx", form=form)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_survives_a_failure(small, tmp_path, corrupted):
    (tmp_path / "a.onnx").write_text("mine")
    corrupted(lambda array: -array)
    with pytest.raises(GateError):
        export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx", overwrite=True)
    assert (tmp_path / "a.onnx").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_zeros_that_are_lost_are_noticed_even_where_no_answer_changes(small, tmp_path, corrupted):
    corrupted(lambda array: np.where(array == 0, np.float32(1e-12), array))
    with pytest.raises(GateError, match=r"fc1\.weight: its zeros"):
        export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


# --- int8. ---


@pytest.fixture(scope="module")
def in_int8(digits, tmp_path_factory):
    adapter, model, patterns = digits
    return export_onnx(model, adapter, tmp_path_factory.mktemp("int8") / "model.onnx", int8=True, patterns=patterns)


def integer_weights(path) -> dict[str, np.ndarray]:
    """The weights of every operator of an ONNX file that multiplies whole numbers, (in, out), by the operator's name."""
    graph, arrays = onnx.load(path).graph, constants(path)
    found = {}
    for node in graph.node:
        if "Integer" in node.op_type or node.op_type.startswith(("QLinear", "QGemm", "DynamicQuantizeM")):
            given = [arrays[name] for name in node.input if name in arrays]
            (weight,) = (array for array in given if array.dtype in (np.int8, np.uint8) and array.ndim >= 2)
            assert weight.ndim == 2, f"{node.op_type}: this test knows the order of a product's channels alone"
            found[node.name] = weight
    return found


def as_without_vnni(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (n, in) of uint8 times weight (in, out) of int8 as vpmaddubsw computes it: pairs are added in 16 bits, and cut off."""
    products = x.astype(np.int32)[:, :, None] * weight.astype(np.int32)[None]
    pairs = products[:, 0::2] + np.pad(products[:, 1::2], ((0, 0), (0, x.shape[1] % 2), (0, 0)))
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(1)


def saturates(weight: np.ndarray) -> bool:
    """Whether the inputs that are worst for some column of the weight are multiplied otherwise than in whole numbers."""
    worst = 255 * np.concatenate([weight.T > 0, weight.T < 0]).astype(np.uint8)
    return not np.array_equal(as_without_vnni(worst, weight), worst.astype(np.int32) @ weight.astype(np.int32))


def test_no_product_of_an_int8_file_can_saturate_on_any_processor(small, tmp_path, in_int8):
    done = export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx", int8=True)
    for file, products in ((done, 2), (in_int8, 23)):
        weights = integer_weights(file.path)
        assert len(weights) == products == file.parity.integer_products
        for name, weight in weights.items():
            assert weight.dtype == np.int8, name
            assert 255 * 2 * np.abs(weight.astype(np.int32)).max() < 2**15, name  # whichever two are added
            assert not saturates(weight), name
    whole = weight.astype(np.int32) * 2 - 1  # the eighth bit back again: this test can fail
    assert saturates(np.clip(whole, -127, 127).astype(np.int8))


def test_weights_that_could_saturate_are_not_kept(small, tmp_path, monkeypatch):
    quantization = pytest.importorskip("onnxruntime.quantization")
    whole = quantization.quantize_dynamic
    monkeypatch.setattr(quantization, "quantize_dynamic", lambda *a, **k: whole(*a, **{**k, "reduce_range": False}))
    with pytest.raises(GateError, match="int8 weights up to 127, more than 64"):
        export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx", int8=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch", [1, 3])
def test_int8_is_exact_whole_number_arithmetic_on_this_processor(digits, in_int8, batch):
    graph, arrays = onnx.load(in_int8.path), constants(in_int8.path)
    makers = {name: node for node in graph.graph.node for name in node.output}
    products = [(n, makers[n.input[0]]) for n in graph.graph.node if n.op_type == "MatMulInteger"]
    scaled = {n.input[0]: n for n in graph.graph.node if n.op_type == "Mul"}
    casts = {n.input[0]: n.output[0] for n in graph.graph.node if n.op_type == "Cast"}
    ends = [scaled[casts[node.output[0]]] for node, _ in products]
    names = {maker.input[0] for _, maker in products} | {end.output[0] for end in ends}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    inputs = random_inputs(digits[0].example_inputs(batch), 0, torch.Generator().manual_seed(batch))
    values = {name: value.numpy() for name, value in OnnxRunner(graph.SerializeToString()).outputs(inputs).items()}
    for (node, maker), end in zip(products, ends, strict=True):
        x, scale = values[maker.input[0]], arrays[makers[end.input[1]].input[1]]
        # As DynamicQuantizeLinear defines it: 0 is in the range, and is a whole number.
        low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
        step = np.float32((high - low) / np.float32(255))
        zero = np.clip(np.rint(-low / step), 0, 255).astype(np.int32)
        levels = np.clip(np.rint(x / step).astype(np.int32) + zero, 0, 255)
        sums = (levels - zero) @ (arrays[node.input[1]].astype(np.int32) - arrays[node.input[3]].astype(np.int32))
        wanted = sums.astype(np.float32) * (step * scale)
        assert np.abs(values[end.output[0]] - wanted).max() <= 1e-5 * wanted.std(), node.name


def test_a_processor_that_multiplies_otherwise_is_noticed(small, tmp_path, monkeypatch):
    right = int8.IntegerProduct.of
    monkeypatch.setattr(int8.IntegerProduct, "of", lambda self, x: 1.001 * right(self, x))
    with pytest.raises(GateError, match="from the product in whole numbers"):
        export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx", int8=True)
    assert list(tmp_path.iterdir()) == []


def test_the_summary_states_what_int8_costs(in_int8):
    parity = in_int8.parity
    assert parity.bounded == "rms_error" and parity.tolerance == exports.INT8_TOLERANCE
    # Measured: 0.06 to 0.26 over both bundled models, dense and pruned; four times the cost would be another fault.
    assert 0.01 < parity.rms_error < 0.3 and parity.rms_error < parity.max_error
    assert parity.integer_error is not None and parity.integer_error <= exports.TOLERANCE
    lines = "\n".join(in_int8.lines())
    assert f"int8's cost: {parity.rms_error:.1e} standard deviations" in lines
    assert "int8's arithmetic: 23 products" in lines


def test_what_int8_would_ruin_is_not_kept(small, tmp_path):
    with torch.no_grad():
        small.fc1.weight[0, :] *= 1e5  # one hidden channel far larger than all others, and multiplied by nothing
        small.fc2.weight[:, 0] = 0
    with pytest.raises(GateError, match="int8 costs this model too much") as caught:
        export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx", int8=True)
    assert "root mean square" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_int8_that_would_change_nothing_is_refused(tmp_path):
    class Scale(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return x * t[:, None, None]

    with pytest.raises(CompressorError, match="no matrix product"):
        export_onnx(Scale(), FeedforwardAdapter(), tmp_path / "a.onnx", int8=True)
    assert list(tmp_path.iterdir()) == []


def test_int8_is_smaller_and_keeps_the_zeros(small, tmp_path):
    plain = export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx")
    done = export_onnx(small, FeedforwardAdapter(), tmp_path / "b.onnx", int8=True)
    assert 1e-4 < done.parity.rms_error < 0.05  # of two layers: measured 0.015
    before, after = constants(plain.path), constants(done.path)
    quantized = {name for name in before if f"{name}_quantized" in after}
    assert len(quantized) == 2
    for name in quantized:
        integers = after[f"{name}_quantized"]
        assert integers.dtype == np.int8
        assert pattern_of(torch.from_numpy(integers.T.copy())) is not None
        assert (integers[before[name] == 0] == after[f"{name}_zero_point"].max()).all()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.onnx", "b.onnx"]


def test_zeros_that_int8_loses_are_noticed(small, tmp_path, monkeypatch):
    quantization = pytest.importorskip("onnxruntime.quantization")
    right = quantization.quantize_dynamic

    def shifted(source: Path, target: Path, **settings: Any) -> None:
        right(source, target, **settings)
        graph = onnx.load(target)
        for one in graph.graph.initializer:
            if one.name.endswith("_zero_point"):
                one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one) + np.int8(1), one.name))
        onnx.save(graph, target)

    monkeypatch.setattr(quantization, "quantize_dynamic", shifted)
    with pytest.raises(GateError, match="int8 gave its zeros a value"):
        export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx", int8=True)
    assert list(tmp_path.iterdir()) == []


# --- Files. ---


def test_weights_too_large_for_one_file_lie_beside_the_graph(small, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 1000)
    adapter, path = FeedforwardAdapter(), tmp_path / "a [1].onnx"  # the former weights are found by that name, too
    for _ in range(2):
        with torch.no_grad():
            small.fc1.bias.add_(1)
        done = export_onnx(small, adapter, path, overwrite=True)
        assert done.data is not None
        assert sorted(tmp_path.iterdir()) == sorted([done.data, path])
        assert done.size_bytes == path.stat().st_size + done.data.stat().st_size
        inputs = random_inputs(adapter.example_inputs(3), 10, torch.Generator().manual_seed(0))
        torch.testing.assert_close(OnnxRunner(path)(inputs), adapter.predict(small, inputs).detach())
    done.data.unlink()
    with pytest.raises(CompressorError, match=r"a \[1\]\.onnx: ONNX Runtime"):
        OnnxRunner(path)


def test_int8_weights_too_large_for_one_file_lie_beside_the_graph(small, tmp_path, monkeypatch):
    adapter, path = FeedforwardAdapter(), tmp_path / "a.onnx"
    whole = export_onnx(small, adapter, tmp_path / "whole.onnx", int8=True)
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 1000)
    in_float = export_onnx(small, adapter, path)
    done = export_onnx(small, adapter, path, int8=True, overwrite=True)
    assert in_float.data is not None and done.data is not None and in_float.data != done.data
    assert sorted(tmp_path.iterdir()) == sorted([done.data, path, whole.path])  # not those of the graph before
    assert done.parity == whole.parity and done.size_bytes == path.stat().st_size + done.data.stat().st_size
    assert done.data.stat().st_size < in_float.size_bytes / 2
    inputs = random_inputs(adapter.example_inputs(3), 10, torch.Generator().manual_seed(0))
    assert torch.equal(OnnxRunner(path)(inputs), OnnxRunner(whole.path)(inputs))
    assert onnx.load(path).metadata_props == onnx.load(whole.path).metadata_props


def test_a_model_is_not_copied_and_stays_as_it_is(small, tmp_path, monkeypatch):
    held = {name: (p.data_ptr(), p._version, p.requires_grad) for name, p in small.named_parameters()}
    seen = []
    graph_of = onnx_graph.graph_of
    monkeypatch.setattr(exports, "graph_of", lambda module, *rest: (seen.append(module), graph_of(module, *rest))[1])
    for form in ("dense", "gathered"):
        export_onnx(small, FeedforwardAdapter(), tmp_path / f"{form}.onnx", form=form)
    assert {name: (p.data_ptr(), p._version, p.requires_grad) for name, p in small.named_parameters()} == held
    places = {place for place, *_ in held.values()}
    for module in seen:
        assert not any(p.requires_grad for p in module.parameters())
    dense, gathered = ({p.data_ptr() for p in module.parameters()} for module in seen)
    assert dense == places and gathered & places  # gathered layers have weights of their own


def test_what_cannot_be_written_is_refused(small, tmp_path):
    adapter = FeedforwardAdapter()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name, kind, words in (
        ("file", UsageError, "--overwrite"),
        ("folder", UsageError, "is a folder"),
        ("file/a.onnx", CompressorError, "cannot be written"),
    ):
        with pytest.raises(kind, match=words):
            export_onnx(small, adapter, tmp_path / name)
    with pytest.raises(UsageError, match="dense, gathered"):
        export_onnx(small, adapter, tmp_path / "a.onnx", form="sparse")
    with pytest.raises(UsageError, match="int8"):
        export_onnx(small, adapter, tmp_path / "a.onnx", form="gathered", int8=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_missing_package_names_its_extra(small, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(
        CompressorError, match=r'onnxscript, not installed[^\n]*\n[^\n]*pip install "diffusion-compressor\[onnx\]"'
    ):
        export_onnx(small, FeedforwardAdapter(), tmp_path / "a.onnx")
    with pytest.raises(CompressorError, match="onnxscript"):
        OnnxRunner(tmp_path / "a.onnx")


def test_a_model_that_cannot_be_followed_is_named(tmp_path, capfd):
    class Branches(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    words = r"feedforward cannot be exported: Could not guard .* \(test_export\.py, line \d+: return x if float\(x\.sum\(\)\) > 0"
    with pytest.raises(CompressorError, match=words) as caught:
        export_onnx(Branches(), FeedforwardAdapter(), tmp_path / "a.onnx")
    assert "\x1b" not in str(caught.value) and capfd.readouterr() == ("", "")  # no graphs, no advice to report it
    assert list(tmp_path.iterdir()) == []


class VectorAdapter(Adapter):
    """Of models that take vectors: in bfloat16, or with the batch in another place."""

    name = "vectors"

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = shape, dtype

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        out = module(inputs)
        return out if isinstance(out, Tensor) else out[0]

    def example_inputs(self, batch_size: int) -> Any:
        return torch.zeros(*(batch_size if size < 0 else size for size in self.shape), dtype=self.dtype)


class Watched(nn.Module):
    """A layer, and a head that only training looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.head(x)


class Turned(nn.Module):
    """A layer whose channels are turned as complex numbers, as rotary positions of diffusers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.layer(x).reshape(*x.shape[:2], 32, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones(32), torch.arange(32.0))).flatten(2)


def test_what_looks_at_strides_is_exported_gathered_too(tmp_path):
    model = sparsify(Turned(), {"layer.weight": NM(2, 4, 64)}).eval()
    made = export_onnx(model, VectorAdapter(-1, 3, 16), tmp_path / "a.onnx", form="gathered")
    assert made.gathered == ("layer.weight",)


@pytest.mark.parametrize("export", [export_onnx, pytest.param(export_tensorrt, marks=pytest.mark.slow)])
def test_a_pruned_layer_that_the_answer_does_not_need_may_be_missing(export, tmp_path):
    patterns = {"layer.weight": NM(2, 4), "head.weight": NM(2, 4)}
    model = sparsify(Watched(), patterns).eval()
    made = export(model, VectorAdapter(-1, 16), tmp_path / "a.onnx", patterns=patterns)
    assert made.parity.max_error < 0.1 and made.path.is_file()


def test_what_depends_on_the_number_of_samples_is_refused(tmp_path):
    class Few(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            return out if input.shape[0] < 8 else 2 * out

    class Halves(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            first, second = super().forward(input).chunk(2)
            return torch.cat((second, first))

    class Seven(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            return out if input.shape[0] != 7 else 2 * out

    class Thirds(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            return out if input.shape[0] % 3 else 2 * out

    limits = {Few: "up to 7", Halves: "2", Seven: "all but 7", Thirds: "all but 3"}
    for model, limit in ((kind(16, 16), limit) for kind, limit in limits.items()):
        with pytest.raises(
            CompressorError, match=f"vectors cannot be exported for any batch: torch follows it for {limit} samples"
        ):
            export_onnx(model, VectorAdapter(-1, 16), tmp_path / "a.onnx")
    with pytest.raises(CompressorError, match=r"ONNX Runtime does not run the graph on sample \(6, 1, 16\)"):
        export_onnx(nn.Linear(16, 16), VectorAdapter(6, -1, 16), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_only_laid_out_anew_from_some_number_of_samples_on_is_exported(tmp_path):
    """As diffusers' UNets do with 64 images, and again with so many that their numbers are more than 2^31."""

    class Anew(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            out = out.contiguous() if input.shape[0] >= 8 else out
            return (out.contiguous() if out.numel() > 2**31 else out)[:, None]

    class Late(Anew):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            return out if input.shape[0] < 1000 else 2 * out

    class Never(nn.Linear):
        """With more than anybody's memory holds."""

        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            return out if out.numel() <= 2**34 else out.contiguous()

    assert export_onnx(Anew(16, 16), VectorAdapter(-1, 16), tmp_path / "a.onnx").parity.max_error < 1e-5
    assert export_onnx(Never(16, 16), VectorAdapter(-1, 16), tmp_path / "c.onnx").parity.max_error < 1e-5
    with pytest.raises(CompressorError, match="torch follows it for up to 999 samples"):
        export_onnx(Late(16, 16), VectorAdapter(-1, 16), tmp_path / "b.onnx")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_graph_takes_float32_whatever_the_example_is_in(dtype, tmp_path):
    made = export_onnx(nn.Linear(16, 16).to(dtype), VectorAdapter(-1, 16, dtype=dtype), tmp_path / "a.onnx")
    assert onnx.load(made.path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(("export", "int8"), [(export_onnx, False), (export_onnx, True), (export_tensorrt, False)])
def test_a_file_names_the_weights_of_the_saved_model_and_whether_it_is_in_int8(tmp_path, export, int8):
    """Of a model in half precision it named those of a copy in float32, which no file has."""
    model = nn.Linear(16, 16).to(torch.bfloat16)
    compressor.save(tmp_path / "saved", model, {})
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["weights_sha256"]
    done = export(model, VectorAdapter(-1, 16), tmp_path / "a.onnx", int8=int8)
    said = {one.key: one.value for one in onnx.load(done.path).metadata_props}
    assert said["compressor.weights_sha256"] == done.weights_sha256 == saved
    assert said["compressor.int8"] == str(int8).lower()


def test_a_product_of_nothing_is_nothing_in_whole_numbers():
    product = int8.IntegerProduct("x", "out", lambda: torch.ones(16, 8, dtype=torch.int32), torch.ones(8))
    assert product.of(torch.zeros(0, 16)).shape == (0, 8)


# --- The command. ---


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory):
    _, model, patterns = digits
    folder = tmp_path_factory.mktemp("run")
    masks = {name: pattern.mask(model.get_parameter(name).detach().abs()) for name, pattern in patterns.items()}
    compressor.save(folder / "model", model, masks, name="uvit-digits")
    return folder


def test_the_command_writes_checks_and_says_what_to_do(cli, saved):
    outcome = cli("export", saved, "--to", "onnx", "--form", "gathered")
    assert outcome.code == 0, outcome.err
    for part in (
        f"{saved / 'model.onnx'}: ",
        "gathered form",
        "parity",
        "20 of 20",
        "sample (batch, 1, 8, 8)",
        "next: run it in ONNX Runtime",
    ):
        assert part in outcome.out
    again = cli("export", saved, "--to", "onnx")
    assert again.code == 2
    assert "--overwrite" in again.err
    (saved / "model.onnx").unlink()


def test_the_command_prints_json(cli, saved, tmp_path, monkeypatch):
    real = torch.onnx.export
    # which onnxscript before 0.6 does
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **named: (print("words"), real(*given, **named))[1])
    outcome = cli(
        "export", saved / "model", "--to", "onnx", "--out", tmp_path / "it.onnx", "--int8", "--json", "--quiet"
    )
    assert outcome.err == ""
    found = json.loads(outcome.out)
    assert (found["path"], found["form"], found["int8"]) == (str(tmp_path / "it.onnx"), "dense", True)
    assert found["size_bytes"] == (tmp_path / "it.onnx").stat().st_size < found["dense_size_bytes"] / 3
    assert found["parity"]["bounded"] == "rms_error"
    assert found["parity"]["rms_error"] <= found["parity"]["tolerance"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--to", "onxx"), 2, "Did you mean 'onnx'"),
        ((), 2, "--to"),
        (("--to", "onnx", "--form", "sparse"), 2, "dense, gathered"),
        (("--to", "onnx", "--form", "gathered", "--int8"), 2, "int8"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(cli, saved, arguments, code, words):
    outcome = cli("export", saved, *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert words in outcome.err and "unexpected" not in outcome.err
    assert [path.name for path in saved.iterdir()] == ["model"]


def test_a_folder_that_is_no_model_is_refused(cli, tmp_path):
    outcome = cli("export", tmp_path, "--to", "onnx")
    assert outcome.code == 1
    assert "config.json" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_gate_is_exit_code_3(cli, saved, corrupted):
    corrupted(lambda array: 2 * array)
    outcome = cli("export", saved, "--to", "onnx")
    assert outcome.code == 3
    assert "differs from PyTorch" in outcome.err
    assert [path.name for path in saved.iterdir()] == ["model"]


def test_an_adapter_without_example_inputs_is_named(cli, install, digits, tmp_path):
    install(
        "blind",
        "from compressor.model_zoo.uvit.sizes import digits\n"
        "from compressor import Adapter\n"
        "class Blind(Adapter):\n"
        "    noised = predict = None\n"
        "    def build(self): return digits().build()\n",
        models={"blind": "Blind"},
    )
    compressor.save(tmp_path / "model", digits[1], {}, name="blind")
    outcome = cli("export", tmp_path / "model", "--to", "onnx")
    assert outcome.code == 1
    assert "Blind has no example inputs" in outcome.err
    assert not (tmp_path / "model" / "model.onnx").exists()


def test_complex_answers_are_refused_in_words() -> None:
    """A graph answers pairs for them: of two columns these were of a shape that could be compared."""
    from compressor.export.parity import Parity, parity

    adapter = SimpleNamespace(
        example_inputs=lambda n: (torch.ones(n, 2),), num_classes=None, fixed_batch=False, predict=lambda m, i: m(*i)
    )
    with pytest.raises(CompressorError, match=r"PyTorch torch\.complex64"):
        parity(
            lambda x: torch.complex(x, x),
            adapter,
            lambda i: torch.stack((i[0], i[0]), -1),
            Parity(),
            "",  # type: ignore[arg-type]
        )


class Masked(nn.Module):
    """Attention to tokens of which some are padding. As in LTX, the size of a head's mask follows from two batches being the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.keys = nn.Linear(4, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, text: Tensor, kept: Tensor) -> Tensor:
        query, keys = (
            layer(of).unflatten(2, (2, 4)).transpose(1, 2) for layer, of in ((self.query, x), (self.keys, text))
        )
        left_out = ((1 - kept.to(x.dtype)) * -10000.0).unsqueeze(1).repeat_interleave(2, dim=0)
        mask = left_out.view(x.shape[0], 2, -1, kept.shape[-1])
        return F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask).transpose(1, 2).flatten(2)


class MaskedAdapter(VectorAdapter):
    def example_inputs(self, batch_size):
        generator = torch.Generator().manual_seed(0)
        x, text = (torch.randn(batch_size, *size, generator=generator) for size in ((5, 4), (3, 6)))
        return {"x": x, "text": text, "kept": torch.tensor([[1, 1, 0]] * batch_size)}

    def predict(self, module, inputs):
        return module(**inputs)


def test_batches_of_several_inputs_are_known_to_be_the_same_while_a_model_is_followed(tmp_path):
    exported = export_onnx(Masked().eval(), MaskedAdapter(), tmp_path / "masked.onnx")
    assert exported.parity.batches == (1, 2, 5) and exported.inputs["kept"] == ("batch", 3)


class Lenient(nn.Module):
    """What torch allows and ONNX does not."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.way = nn.Linear(4, 4), way

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.way(self.layer(x), time.half()[:, None, None].expand(-1, 3, 4)).float()
        return out


@pytest.mark.parametrize(
    "way",
    [
        lambda x, half: x.squeeze(1) + x.squeeze(-1) + x.unsqueeze(2).squeeze((1, 2)),  # PixArt's
        lambda x, half: torch.concat([half, x, half], 1),  # SDXL's in float16
        lambda x, half: torch.stack([x, half]).sum(0),
    ],
)
def test_what_torch_allows_and_onnx_does_not_is_put_right(tmp_path, way):
    """ONNX Runtime refused these graphs."""

    class Both(VectorAdapter):
        def predict(self, module, inputs):
            return module(*inputs)

        def example_inputs(self, batch_size):
            return torch.zeros(batch_size, 3, 4), torch.full((batch_size,), 0.5)

    done = export_onnx(Lenient(way).eval(), Both(), tmp_path / "a.onnx")
    onnx.checker.check_model(onnx.load(done.path), full_check=True)
    assert done.parity.batches == (1, 2, 5) and done.inputs["sample"] == ("batch", 3, 4)


def test_sizes_without_a_hash_are_joined():
    class Joining(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return joined([x, x + 1])

    length = torch.export.Dim("length", min=3, max=9)
    program = torch.export.export(Joining(), (torch.ones(2, 4),), dynamic_shapes=({1: length},))
    assert program.module()(torch.ones(2, 7)).shape == (4, 7)


def test_calls_of_one_size_are_checked_at_that_size_and_exported_for_it_alone_where_it_must_be(tmp_path):
    class Fixed(MaskedAdapter):
        fixed_batch = True

        def example_inputs(self, batch_size):
            return super().example_inputs(3)

        def predict(self, module, inputs):
            out = super().predict(module, inputs)
            return out if only is None or out.shape[0] in only else out * 2

    only: set[int] | None = None
    done = export_onnx(Masked().eval(), Fixed(), tmp_path / "any.onnx")
    assert done.parity.batches == (3,) and done.inputs["x"] == ("batch", 5, 4)
    only = {3}  # as models ask that torch cannot follow for any number: it has no hash
    done = export_onnx(Masked().eval(), Fixed(), tmp_path / "one.onnx")
    assert done.parity.batches == (3,) and done.inputs["x"] == (3, 5, 4)
