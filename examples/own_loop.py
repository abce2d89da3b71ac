"""`compressor.Shadow` in a training loop of your own, with accelerate and an average of the weights.

    python examples/own_loop.py

The lines marked with `# 1` to `# 5` are all that sparsity adds to the loop.
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn

import compressor
from compressor.plugins.sparsedm import SparseDM

STEPS, DECAY = 200, 0.95


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    accelerator = Accelerator(cpu=True)
    prepared, stepping = accelerator.prepare(model, optimizer)

    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}  # 1
    shadow = compressor.Shadow(weights, SparseDM(), stepping)  # 2
    average = compressor.Average(model, shadow, DECAY)  # of the dense weights: one of sparse weights is not sparse

    basis = torch.randn(4, 16)
    for step in range(STEPS):
        clean = torch.randn(64, 4) @ basis  # your data
        noise = torch.randn_like(clean)
        loss = (prepared(clean + noise) - noise).square().mean()
        accelerator.backward(loss)
        shadow.progress = (step + 1) / STEPS  # 3
        stepping.step()
        stepping.zero_grad()
        average.update()
    shadow.close()  # 4

    masks = average.write_()
    zeros = sum(int((weights[name] == 0).sum()) for name in masks) / sum(weights[name].numel() for name in masks)
    print(f"loss {loss.item():.3f}, zeros {zeros:.1%}")
    with tempfile.TemporaryDirectory() as folder:
        compressor.save(f"{folder}/sparse", model, masks)  # 5: every mask is verified
        compressor.load(f"{folder}/sparse", model=model)


if __name__ == "__main__":
    main()
