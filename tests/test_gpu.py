"""What only a GPU can show."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from imitated import BF16, error, normal, sparse_, unit
from torch import Tensor, nn

import compressor
from compressor import NM, parse
from compressor.lower import cusparselt
from compressor.lower.cusparselt import CuSparseLt, CuSparseLtDirect, fp8, int8
from compressor.lower.cusparselt_tuning import Algorithm, Product, Tuned, tuned
from compressor.lower.dense import DenseGelu
from compressor.lower.graphs import Graphed
from compressor.lower.quantised import dense_fp8, dense_int8, kernels
from compressor.lower.torchao_fp8 import TorchaoFp8
from compressor.registry import build_pruner, pruner_class
from compressor.saving.state import load_state, save_state
from compressor.sparsity.on_gpu import kernels_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_is_2_4_after_every_step_on_a_gpu(dtype, model, adapter, samples):
    training = compressor.Training(steps=4, batch_size=16, device="cuda", dtype=dtype)
    pruner = build_pruner(pruner_class("sparsedm"), {})
    run = compressor.FineTuning(model, pruner, adapter=adapter, data=samples, training=training)
    for _ in compressor.steps(run):
        for name, mask in run.shadow.masks.items():
            mask.pattern.verify(dict(run.student.named_parameters())[name].detach())


def test_a_result_from_a_gpu_loads_on_a_cpu(model, adapter, samples, tmp_path):
    pruner = build_pruner(pruner_class("sparsedm"), {})
    result = compressor.prune(model, pruner, adapter=adapter, data=samples, steps=3, batch_size=16, device="cuda")
    compressor.save(tmp_path / "saved", result.model, result.masks)
    loaded = compressor.load(tmp_path / "saved", model=model)
    assert next(loaded.parameters()).device.type == "cpu"


# --- 2:4, with the real library. ---


def on_gpu(module: nn.Module, dtype: torch.dtype = BF16) -> nn.Module:
    reason = CuSparseLt().unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    return module.to("cuda", dtype)


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's default algorithm: a search takes a process of its own for every product, and one test tries that."""
    monkeypatch.setattr(cusparselt, "tuned", lambda product, index: Tuned(Algorithm()))
    monkeypatch.setattr(cusparselt, "search_together", lambda products, index: None)


class TestOnGpu:
    """With the real library."""

    @pytest.mark.parametrize("rows", [8, 5, 257, 2056])
    @pytest.mark.parametrize(("out", "inner"), [(512, 2048), (2048, 512), (16, 16), (1152, 4608)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_linear_is_the_dense_one(self, default, rows, out, inner, bias):
        layer: Any = on_gpu(sparse_(nn.Linear(inner, out, bias=bias)))
        lowered = CuSparseLt().build(unit(layer, (rows, inner)))
        for tokens in (rows, rows + 3):
            x = normal(tokens, inner, dtype=BF16).cuda()
            wanted = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
            assert error(lowered(x), wanted) < 1e-2

    @pytest.mark.parametrize(
        ("backend", "allowed"),
        [(int8(), 2e-2), (fp8(), 6e-2), (TorchaoFp8(), 6e-2), (dense_int8(), 2e-2), (dense_fp8(), 6e-2)],
    )
    def test_8_bits_are_near_the_dense_layer(self, default, backend, allowed):
        if reason := backend.unavailable(torch.device("cuda")):
            pytest.skip(reason)
        layer: Any = on_gpu(sparse_(nn.Linear(512, 2048)))
        lowered = backend.build(unit(layer, (1028, 512)))
        x = normal(1028, 512, dtype=BF16).cuda()
        assert error(lowered(x), F.linear(x.double(), layer.weight.double(), layer.bias.double())) < allowed

    @pytest.mark.parametrize(
        ("backend", "allowed"),
        [
            (int8(), 3e-2),
            (fp8(), 9e-2),
            (TorchaoFp8(), 9e-2),
            (dense_int8(), 3e-2),
            (dense_fp8(), 9e-2),
            (DenseGelu(), 1e-2),
        ],
    )
    @pytest.mark.parametrize("approximate", ["none", "tanh"])
    def test_a_pair_with_its_gelu_in_a_kernel_is_near_the_dense_one(self, default, backend, allowed, approximate):
        pair: Any = on_gpu(
            nn.Sequential(sparse_(nn.Linear(512, 1536)), nn.GELU(approximate), sparse_(nn.Linear(1536, 512)))
        )
        whole = unit(pair, (1028, 512))
        if reason := backend.unavailable(torch.device("cuda")) or backend.refusal(whole):
            pytest.skip(reason)
        lowered = backend.build(whole)
        x = normal(1028, 512, dtype=BF16).cuda()
        wanted = copy.deepcopy(pair).double()(x.double())
        assert error(lowered(x), wanted) < allowed and error(Graphed(lowered)(x), wanted) < allowed

    def test_inputs_are_quantised_by_the_kernel(self):
        on_gpu(nn.Linear(16, 16))
        assert kernels(0) is not None

    @pytest.mark.parametrize("bias", [True, False])
    def test_a_planned_product_is_the_dense_one(self, default, bias):
        if reason := CuSparseLtDirect().unavailable(torch.device("cuda")):
            pytest.skip(reason)
        layer: Any = on_gpu(sparse_(nn.Linear(512, 2048, bias=bias)))
        lowered = CuSparseLtDirect().build(unit(layer, (2, 257, 512)))
        wrapped = Graphed(lowered)
        for tokens in (514, 8, 16, 24, 32, 40, 514):  # the plan of the first is the graph's, and kept
            x = normal(tokens, 512, dtype=BF16).cuda()
            wanted = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
            assert error(lowered(x), wanted) < 1e-2
            with torch.no_grad():
                given = normal(2, 257, 512, dtype=BF16, seed=tokens).cuda()
                assert error(wrapped(given), F.linear(given, layer.weight, layer.bias)) < 1e-2

    @pytest.mark.parametrize("approximate", ["none", "tanh"])
    def test_a_planned_pair_is_the_dense_one(self, default, approximate):
        if reason := CuSparseLtDirect().unavailable(torch.device("cuda")):
            pytest.skip(reason)
        pair: Any = on_gpu(
            nn.Sequential(sparse_(nn.Linear(512, 2048)), nn.GELU(approximate), sparse_(nn.Linear(2048, 512)))
        )
        lowered = CuSparseLtDirect().build(unit(pair, (1028, 512)))
        x = normal(1028, 512, dtype=BF16).cuda()
        assert error(lowered(x), copy.deepcopy(pair).double()(x.double())) < 1.5e-2

    def test_the_search_finds_a_right_algorithm_and_no_fault(self, monkeypatch, tmp_path):
        on_gpu(nn.Linear(16, 16))
        monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))
        tuned.cache_clear()
        found = tuned(Product(2056, 2048, 512, "bfloat16", True), 0)
        assert found.median_ms is not None and found.note is None

    def test_a_lowered_layer_replays_in_a_graph_and_compiles(self, default):
        layer: Any = on_gpu(sparse_(nn.Linear(512, 2048)))
        lowered = CuSparseLt().build(unit(layer, (2, 257, 512)))
        compiled: Any = torch.compile(lowered, fullgraph=True)
        wrapped = Graphed(lowered)
        with torch.no_grad():
            for seed in range(3):
                x = normal(2, 257, 512, dtype=BF16, seed=seed).cuda()
                # sums by segments add up in any order
                assert error(wrapped(x), lowered(x)) < 1e-2 and error(compiled(x), lowered(x)) < 1e-2
        assert len(wrapped._recordings) == 1
        torch.compiler.reset()

    def test_a_model_lowered_on_a_gpu_keeps_its_numbers(self, default):
        adapter = compressor.registry.adapter("uvit-cifar10")
        torch.manual_seed(0)
        model = on_gpu(adapter.build().eval(), torch.float32)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name):
                with torch.no_grad():
                    module.weight.copy_(NM(2, 4).mask(module.weight.abs()).apply(module.weight))
        inputs = tuple(x.cuda() if isinstance(x, Tensor) else x for x in adapter.example_inputs(16))
        result = compressor.lower(
            model, inputs, ["eager", "cusparselt"], BF16, adapter=adapter, compiled=False, cache=False
        )
        measured = [layer.candidate("cusparselt") for layer in result.plan.layers if "2:4" in layer.patterns]
        assert measured and all(c is not None and c.median_ms is not None for c in measured)
        x = (torch.randn(16, 3, 32, 32, device="cuda"), *inputs[1:])
        with torch.no_grad():
            assert error(adapter.predict(result.model, x), adapter.predict(model, x)) < 0.1

    @pytest.mark.parametrize("compiled", [False, True])
    def test_fused_projections_are_one_product_in_a_graph_and_compiled(self, default, compiled):
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name in ("to_q", "to_k", "to_v", "to_out"):
                    self.add_module(name, sparse_(nn.Linear(512, 512)))

            def forward(self, x: Tensor) -> Tensor:
                query, key, value = (
                    layer(x).unflatten(-1, (8, 64)).transpose(1, 2) for layer in list(self.children())[:3]
                )
                out = nn.functional.scaled_dot_product_attention(query, key, value)
                return self.to_out(out.transpose(1, 2).flatten(2))

        torch.manual_seed(0)
        model = on_gpu(Attention().eval())
        x = normal(8, 257, 512, dtype=BF16).cuda()
        result = compressor.lower(model, x, ["eager", "cusparselt"], compiled=compiled, cache=False)
        assert result.plan.fused == (("to_q", "to_k", "to_v"),)
        assert {form.name for form in result.plan.forms} >= {"dense", "dense, graph"}
        plan = result.plan.model_copy(update={"choice": "dense, compiled" if compiled else "dense, graph"})
        form = compressor.lower(model, x, plan=plan).model
        with torch.no_grad():
            for seed in range(3):
                x = normal(8, 257, 512, dtype=BF16, seed=seed).cuda()
                assert error(form(x), model(x)) < 2e-2 and error(result.model(x), model(x)) < 2e-2
        torch.compiler.reset()


# --- A masked step. ---


def test_masks_of_a_gpu_are_those_of_a_cpu():
    """By Triton's kernels where it is installed, which `differences` has then found to give torch's bits."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, -2.0, 3.5, float("inf"), -float("inf")])
    scores = [values[torch.randint(8, shape)] for shape in ((1152, 4608), (64, 128, 3, 3))]
    scores += [torch.randn(1152, 1152), torch.randn(512, 64, dtype=BF16)]
    # a GPU adds up rows in another order, which is as right: the sums of these are exact
    exact = [(4 * score).round() / 4 for score in scores]
    single, shared = (NM(2, 4), NM(1, 4), NM(3, 8), NM(5, 16)), (NM(2, 4, 4), parse("venom:64:2:8"))
    for pattern, given in [(one, scores) for one in single] + [(one, exact) for one in shared]:
        on_gpu = pattern.magnitude_masks({str(i): score.cuda() for i, score in enumerate(given)})
        for mask, score in zip(on_gpu.values(), given, strict=True):
            assert torch.equal(mask.keep.cpu(), pattern.mask(score.abs()).keep)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_of_a_masked_step_are_taken():
    assert kernels_for(torch.ones(2, 4, device="cuda")) is not None


@pytest.mark.parametrize("fixed", [True, False])
def test_a_run_on_a_gpu_goes_on_as_it_would_have(fixed, model, adapter, samples, tmp_path):
    """The same bits after an interruption: the fused optimizer's state comes back whole."""
    training = compressor.Training(steps=6, batch_size=16, device="cuda", dtype="bfloat16")
    pruner = build_pruner(pruner_class("sparsedm"), {"fixed": fixed})

    def begun(previous: Any = None) -> compressor.FineTuning:
        return compressor.FineTuning(model, pruner, adapter=adapter, data=samples, training=training, previous=previous)

    whole = list(compressor.steps(begun()))
    first = begun()
    assert first.optimizer.param_groups[0]["fused"] is True
    for _ in range(3):
        first.advance()
    save_state(tmp_path, first.state())
    assert list(compressor.steps(begun(load_state(tmp_path)))) == whole[3:]
