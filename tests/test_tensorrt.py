"""Files for TensorRT: 2:4 where it looks, typed throughout, checked in ONNX Runtime, with the command that builds an engine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import compressor
from compressor import NM, Adapter, CompressorError
from compressor.errors import GateError, UsageError
from compressor.export import tensorrt, tensorrt_graph
from compressor.export.graph import OnnxRunner, graph_of
from compressor.export.parity import random_inputs
from compressor.export.tensorrt import export_tensorrt
from compressor.lower.job import in_dtype
from compressor.weights import state_sha256

pytestmark = pytest.mark.xdist_group("tensorrt")
"""The models of this file are exported once, not once for each worker."""

TWO_OF_FOUR = NM(2, 4)


class Denoiser(nn.Module):
    """Convolutions of 3x3 and 1x1 on pictures, then a feed-forward on pixels, conditioned on a time; one layer is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.point = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 16, 1),
        )
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.time, self.fc1, self.fc2 = nn.Linear(4, 16), nn.Linear(16, 32), nn.Linear(32, 3)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = F.silu(self.conv(F.silu(self.first(x))))
        embedded = self.time(torch.stack([(t * f).cos() for f in (0.1, 0.3, 0.5, 0.7)], 1).to(x.dtype))
        x = self.grouped(self.point(x)) + embedded[:, :, None, None]
        out: Tensor = self.fc2(F.gelu(self.fc1(x.movedim(1, -1)))).movedim(-1, 1)
        return out


class DenoiserAdapter(Adapter):
    name = "denoiser"

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        out: Tensor = module(*inputs)
        return out

    def example_inputs(self, batch_size: int) -> Any:
        return torch.zeros(batch_size, 3, 8, 8), torch.ones(batch_size)


PRUNED = ("conv", "point", "grouped", "time", "fc1", "fc2")


def pruned() -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser().eval()
    with torch.no_grad():
        for name in PRUNED:
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(TWO_OF_FOUR.mask(weight.abs()).apply(weight))
    return model


@pytest.fixture
def denoiser() -> nn.Module:
    return pruned()


@pytest.fixture(scope="module")
def traced() -> onnx.ModelProto:
    """What PyTorch's exporter makes of the model, which takes seconds."""
    adapter = DenoiserAdapter()
    return graph_of(in_dtype(pruned(), torch.float16), adapter, adapter.example_inputs(2), ["sample", "timestep"])


@pytest.fixture
def quick(traced, monkeypatch) -> None:
    """An export of the model as it is starts with `traced`."""

    def again(*arguments: Any) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(traced)
        return copy

    monkeypatch.setattr(tensorrt, "graph_of", again)


def two_of_four(weight: np.ndarray, axis: int) -> bool:
    """By the words of TensorRT's documentation: of every four neighbours along `axis` at least two are zero."""
    rows = np.moveaxis(weight, axis, -1).reshape(-1, 4)
    return bool(((rows == 0).sum(1) >= 2).all())


def weight_of(graph: onnx.ModelProto, layer: str) -> tuple[onnx.NodeProto, np.ndarray, np.ndarray | None]:
    """The node named as the layer, what it multiplies by, and the scales of that, looked up without the code that is tested."""
    constants = {one.name: numpy_helper.to_array(one) for one in graph.graph.initializer}
    makers = {one.output[0]: one for one in graph.graph.node}
    (node,) = (one for one in graph.graph.node if one.name == layer)
    name, scale = node.input[1], None
    while name in makers:
        assert makers[name].op_type in ("QuantizeLinear", "DequantizeLinear")
        assert not constants[makers[name].input[2]].any()
        name, scale = makers[name].input[0], constants[makers[name].input[1]]
    return node, constants[name], scale


@pytest.fixture(scope="module", params=[False, True], ids=["float16", "int8"])
def ready(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("ready") / "it.onnx"
    return export_tensorrt(pruned(), DenoiserAdapter(), path, int8=request.param, batch=4)


def test_every_2_4_layer_lies_as_tensorrt_wants_it(denoiser, ready):
    graph = onnx.load(ready.path)
    onnx.checker.check_model(graph, full_check=True)
    assert set(ready.eligible) == {"conv", "point", "time", "fc1", "fc2"}
    for layer, shape in ready.eligible.items():
        weight = denoiser.get_parameter(f"{layer}.weight").detach().half().numpy()
        node, constant, scale = weight_of(graph, layer)
        assert shape == weight.shape and constant.dtype == np.float16
        inputs = 1 if node.op_type == "Conv" else 0  # where TensorRT counts
        assert two_of_four(constant, inputs) and not any(a.name == "transB" and a.i for a in node.attribute)
        assert np.array_equal(constant, weight if node.op_type == "Conv" else weight.T)
        assert (scale is not None) == ready.int8
        if scale is not None:
            sides = [1] * constant.ndim
            sides[1 - inputs if constant.ndim == 2 else 0] = -1
            codes = np.rint(constant.astype(np.float64) / scale.astype(np.float64).reshape(sides))
            assert np.abs(codes).max() <= 127 and np.array_equal(codes == 0, np.abs(codes) < 0.5)
            assert ((constant == 0) <= (codes == 0)).all() and two_of_four(codes, inputs)


def test_layers_that_it_will_not_take_have_reasons(ready):
    assert ready.left == {
        "first": "3 input channels, no multiple of 4",
        "grouped": "a convolution in 2 groups",
        "unused": "it does not run",
    }


def test_types_are_in_the_file_and_outside_it_is_float32(ready):
    graph = onnx.load(ready.path)
    ends = [*graph.graph.input, *graph.graph.output]
    assert {one.type.tensor_type.elem_type for one in ends} == {TensorProto.FLOAT}
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)
    types = {one.name: one.type.tensor_type.elem_type for one in inferred.graph.value_info}
    types |= {one.name: one.data_type for one in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv", "Add"):
            found = {types[name] for name in node.input if name}
            assert found <= {TensorProto.FLOAT16, TensorProto.INT64} and len(found) == 1, node.name
    names = {n.op_type for n in graph.graph.node}
    assert ({"QuantizeLinear", "DequantizeLinear"} <= names) == ready.int8


def test_products_of_8_bits_take_and_give_8_bits(ready):
    if not ready.int8:
        return
    graph = onnx.load(ready.path).graph
    makers = {name: one for one in graph.node for name in one.output}
    users = {name: [n for n in graph.node if name in n.input] for n in graph.node for name in n.output}
    for layer in ready.eligible:
        (node,) = (one for one in graph.node if one.name == layer)
        assert makers[node.input[0]].op_type == makers[node.input[1]].op_type == "DequantizeLinear"
        out = node.output[0]
        if node.op_type == "MatMul" and layer != "fc2":  # the bias belongs to the product
            (add,) = users[out]
            assert add.op_type == "Add"
            out = add.output[0]
        if layer != "fc2":  # what it gives is turned and leaves
            assert [one.op_type for one in users[out]] == ["QuantizeLinear"]
    doubled = [
        n
        for n in graph.node
        if n.op_type == "QuantizeLinear" and makers.get(n.input[0], n).op_type == "DequantizeLinear"
    ]
    assert doubled == []
    assert "random inputs" in str(ready.calibration)


def test_it_answers_as_the_model_in_float32(denoiser, ready):
    rng = torch.Generator().manual_seed(7)
    inputs = random_inputs(DenoiserAdapter().example_inputs(3), None, rng)
    with torch.no_grad():
        wanted = denoiser(*inputs)
    error = float((OnnxRunner(ready.path, as_written=True)(inputs) - wanted).square().mean().sqrt() / wanted.std())
    assert 1e-5 < error < (0.1 if ready.int8 else 3e-3)
    assert error < 3 * ready.parity.rms_error and ready.parity.bounded == "rms_error"


def test_the_file_beside_it_says_all_and_its_command_builds(ready):
    told = json.loads((ready.path.parent / "it.build.json").read_text())
    assert told["path"] == "it.onnx" and told["eligible"]["conv"] == [8, 8, 3, 3] and told["left"] == ready.left
    assert sorted(path.name for path in ready.path.parent.iterdir()) == ["it.build.json", "it.onnx"]
    words = shlex.split(told["command"])
    assert words[0] == "trtexec" and {"--onnx=it.onnx", "--stronglyTyped", "--sparsity=enable", "--verbose"} <= set(
        words
    )
    assert "--optShapes=x:4x3x8x8,t:4" not in words
    assert "--optShapes=sample:4x3x8x8,timestep:4" in words and "--minShapes=sample:1x3x8x8,timestep:1" in words
    assert not [
        word for word in words if word in ("--fp16", "--int8", "--best")
    ]  # TensorRT 11 has none, 10 forbids them


def test_a_description_of_something_else_is_kept(denoiser, tmp_path):
    (tmp_path / "it.build.json").write_text("mine")
    with pytest.raises(UsageError, match=r"it\.build\.json is there already"):
        export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "it.onnx")
    assert (tmp_path / "it.build.json").read_text() == "mine"


def test_a_graph_of_fixed_size_has_no_shapes():
    command = tensorrt.build_command("a model.onnx", {"x": (1, 2)}, 8)
    assert "Shapes" not in command and "'--onnx=a model.onnx'" in command


def test_the_model_stays_as_it_was(quick, denoiser, tmp_path):
    before = state_sha256(denoiser.state_dict())
    export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "it.onnx")
    assert state_sha256(denoiser.state_dict()) == before and denoiser.fc1.weight.dtype == torch.float32


def test_ranges_come_from_the_inputs_that_are_given(quick, denoiser, tmp_path):
    loud = [(torch.full((1, 3, 8, 8), 50.0), torch.ones(1))]
    ready = export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "it.onnx", int8=True, calibration=loud)
    assert ready.calibration == "1 inputs that were given"
    quiet = export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "quiet.onnx", int8=True)

    def scale(path: Path) -> float:
        whole = onnx.load(path)
        constants = {one.name: numpy_helper.to_array(one) for one in whole.graph.initializer}
        makers = {one.output[0]: one for one in whole.graph.node}
        (node,) = (one for one in whole.graph.node if one.name == "conv")
        return float(constants[makers[node.input[0]].input[1]])

    assert scale(ready.path) > 5 * scale(quiet.path)
    with pytest.raises(UsageError, match="calibration is empty"):
        export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "none.onnx", int8=True, calibration=[])


@pytest.mark.parametrize("turned", ["transpose", "flag", "both"])
def test_weights_that_lie_turned_are_laid_out(turned):
    weight = np.arange(12, dtype=np.float16).reshape(3, 4)
    helper = onnx.helper
    nodes, name = [], "w"
    if turned != "flag":
        nodes.append(helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]))
        name = "t"
    flag = {} if turned == "transpose" else {"transB": 1}
    given = weight if turned != "both" else weight.T.copy()
    nodes.append(helper.make_node("Gemm", ["x", name], ["y"], name="it", **flag))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [2, side]) for n, side in (("x", 4), ("y", 3))]
    graph = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(given, "w")]),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    tensorrt_graph.straighten(graph)
    assert [node.op_type for node in graph.graph.node] == ["Gemm"] and not graph.graph.node[0].attribute
    (constant,) = graph.graph.initializer
    assert np.array_equal(numpy_helper.to_array(constant), weight.T)
    (product,) = tensorrt_graph.products(graph)
    assert np.array_equal(product.weight.numpy(), weight) and x.shape == (2, 4)


@pytest.mark.slow
def test_equal_layers_are_told_apart_or_share(tmp_path):
    class Same(DenoiserAdapter):
        def example_inputs(self, batch_size: int) -> Any:
            return torch.zeros(batch_size, 5, 8), torch.ones(batch_size)

        def predict(self, module: nn.Module, inputs: Any) -> Tensor:
            out: Tensor = module(inputs[0])
            return out + inputs[1][:, None, None]

    torch.manual_seed(0)
    first, second, third = (nn.Linear(8, 8) for _ in range(3))
    with torch.no_grad():
        first.weight.copy_(TWO_OF_FOUR.mask(first.weight.abs()).apply(first.weight))
        second.weight.copy_(first.weight)
    third.weight = first.weight
    ready = export_tensorrt(nn.Sequential(first, second, third).eval(), Same(), tmp_path / "it.onnx", int8=True)
    assert set(ready.eligible) == {"0", "1", "2"}


# --- What must not happen. ---


@pytest.mark.parametrize("int8", [False, True])
def test_zeros_that_are_lost_are_noticed(quick, denoiser, tmp_path, monkeypatch, int8):
    made = tensorrt.write_described

    def broken(graph, *where):
        for one in graph.graph.initializer:
            if one.name == "fc1.weight":
                array = numpy_helper.to_array(one).copy()
                array[array == 0] = 1e-6  # changes no answer
                one.CopyFrom(numpy_helper.from_array(array, one.name))
        made(graph, *where)

    monkeypatch.setattr(tensorrt, "write_described", broken)
    with pytest.raises(GateError, match=r"fc1\.weight"):
        export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "it.onnx", int8=int8)
    assert list(tmp_path.iterdir()) == []


def broken_scales(graph, ready):
    for one in graph.graph.initializer:
        if one.name == "fc1.weight_zero":
            one.CopyFrom(numpy_helper.from_array(np.ones(one.dims, np.int8), one.name))


def broken_axis(graph, ready):
    for node in graph.graph.node:
        if node.name == "fc1":
            node.input[1] = "fc1.weight"  # past its Q and DQ


@pytest.mark.parametrize(("broken", "words"), [(broken_scales, "move zeros"), (broken_axis, "not in 8 bits")])
def test_8_bits_that_would_move_zeros_are_noticed(quick, denoiser, tmp_path, broken, words):
    ready = export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "it.onnx", int8=True)
    graph = onnx.load(ready.path)
    weights = {"fc1.weight": denoiser.fc1.weight.detach().half()}
    tensorrt_graph.verify(graph, weights, True)
    broken(graph, ready)
    with pytest.raises(GateError, match=words):
        tensorrt_graph.verify(graph, weights, True)


def test_a_file_that_answers_otherwise_is_not_kept(quick, denoiser, tmp_path):
    with torch.no_grad():
        denoiser.fc2.bias += 1  # `quick` has the graph without
    with pytest.raises(GateError, match="differs from PyTorch"):
        export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "it.onnx")
    assert list(tmp_path.iterdir()) == []


def test_graphs_are_carried_out_as_they_are_written(quick, denoiser, tmp_path, monkeypatch):
    """What ONNX Runtime 1.32 makes of a product in float16 behind a Transpose of the first two dims ends the process."""
    real, how = tensorrt.OnnxRunner, []

    def runner(*given: Any, **named: Any) -> Any:
        how.append(named)
        return real(*given, **named)

    monkeypatch.setattr(tensorrt, "OnnxRunner", runner)
    export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "it.onnx", int8=True)
    assert how == [{"as_written": True}] * 2


@pytest.mark.slow
def test_what_float16_cannot_hold_is_refused(denoiser, tmp_path):
    for largest, refused in (
        (6e4, "not finite in float16"),
        (1e6, r"fc1\.weight: 1e\+06 is too large for torch\.float16"),
    ):
        with torch.no_grad():
            denoiser.fc1.weight.mul_(largest / denoiser.fc1.weight.abs().max())
        with pytest.raises(CompressorError, match=refused):
            export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "it.onnx", int8=True)


def test_a_pruned_weight_has_to_be_in_the_graph(quick, denoiser, tmp_path, monkeypatch):
    patterns = {"fc1.weight": TWO_OF_FOUR}
    monkeypatch.setattr(tensorrt, "name_layers", lambda graph, weights: {})
    with pytest.raises(GateError, match=r"fc1\.weight: its zeros are not in the exported graph"):
        export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "it.onnx", patterns=patterns)
    ready = export_tensorrt(denoiser, DenoiserAdapter(), tmp_path / "it.onnx")
    assert ready.eligible == {} and "no constant" in ready.left["fc1"]


@pytest.mark.slow
def test_dense_models_and_what_cannot_be_are_refused(tmp_path):
    torch.manual_seed(0)
    model, adapter = Denoiser().eval(), DenoiserAdapter()
    with pytest.raises(CompressorError, match="no layer is 2:4"):
        export_tensorrt(model, adapter, tmp_path / "it.onnx", int8=True)
    with pytest.raises(UsageError, match="batch 0"):
        export_tensorrt(model, adapter, tmp_path / "it.onnx", batch=0)
    ready = export_tensorrt(model, adapter, tmp_path / "it.onnx")
    assert ready.eligible == {} and "more than two entries" in ready.left["fc1"]
    with pytest.raises(UsageError, match="already"):
        export_tensorrt(model, adapter, tmp_path / "it.onnx")


# --- The command. ---


@pytest.mark.slow
def test_the_command_writes_both_files_and_says_what_to_do(cli, tmp_path):
    from compressor import registry

    adapter = registry.adapter("uvit-digits")
    model = adapter.load(None)
    masks = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("fc1.weight", "fc2.weight")):
                masks[name] = TWO_OF_FOUR.mask(weight.abs())
                weight.copy_(masks[name].apply(weight))
    compressor.save(tmp_path / "model", model, masks, name="uvit-digits")
    outcome = cli("export", tmp_path / "model", "--to", "tensorrt-ready", "--batch", "8", "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert len(found["eligible"]) == 10 and "--optShapes=sample:8x1x8x8,timestep:8" in found["command"]
    assert (tmp_path / "model" / "tensorrt.onnx").exists() and (tmp_path / "model" / "tensorrt.build.json").exists()
    outcome = cli("export", tmp_path / "model", "--to", "tensorrt-ready", "--overwrite")
    for part in (
        "2:4 where TensorRT looks: 10 of 25 layers",
        "trtexec --onnx=tensorrt.onnx",
        "(Sparsity)",
        "more, all in",
    ):
        assert part in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "tensorrt"), "Did you mean 'tensorrt-ready'"),
        (("--to", "tensorrt-ready", "--form", "gathered"), "leave --form out"),
        (("--to", "onnx", "--batch", "4"), "leave --batch out"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(cli, tmp_path, arguments, words):
    outcome = cli("export", tmp_path, *arguments)
    assert (outcome.code, outcome.out) == (2, "") and words in outcome.err
