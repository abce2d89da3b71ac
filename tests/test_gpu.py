"""What only a GPU can show."""

from __future__ import annotations

import pytest
import torch

import compressor
from compressor.registry import build_pruner, pruner_class

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
