"""The Fréchet distance in the features of a small classifier that is bundled with its data, and how such a one is trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.quality.metric import Metric
from compressor.seeds import generator
from compressor.weights import load_strictly, read_weights, weights_sha256


class Classifier(nn.Module):
    """A network of images of one shape: `maps` (n, k, h, w) of where what is, `features` (n, d) of the whole."""

    @abstractmethod
    def maps(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def features(self, images: Tensor) -> Tensor: ...


def fit(
    model: Classifier, rows: Tensor, loss_of: Callable[[Tensor, torch.Generator], Tensor], seed: int, epochs: int
) -> Iterator[float]:
    """Train `model` on the numbers `rows` (n,) of a data set, 64 at a time: AdamW and cosine. Gives the mean loss of each epoch.

    `loss_of` gives the loss of some rows; what it varies by chance it draws from the generator.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        rng = generator(seed, "classifier", epoch)
        losses = []
        for part in torch.split(rows[torch.randperm(len(rows), generator=rng)], 64):
            loss = loss_of(part, rng)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        schedule.step()
        yield sum(losses) / len(losses)


class FDOfClassifier(Metric):
    """The distance for images of `shape` (channels, height, width), by `network` with the weights of the file `weights`."""

    shape: tuple[int, int, int]

    def __init__(self, network: Classifier, weights: Path) -> None:
        load_strictly(network, read_weights(weights), weights)
        self._network = network.eval()

    def features(self, images: Tensor) -> Tensor:
        return self._extracted(self._network.features, images)

    def spatial(self, images: Tensor) -> Tensor:
        """The first seven maps, as Nash et al. 2021 take the first seven of Inception's."""
        return self._extracted(lambda x: self._network.maps(x)[:, :7].flatten(1), images)

    @torch.no_grad()
    def _extracted(self, extract: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        if images.shape[1:] != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise CompressorError(
                f"{self.name} takes images (n, {wanted}), got {tuple(images.shape)}",
                "Choose another metric with --set evaluate.metric=NAME, or none with --set evaluate.metric=null",
            )
        return extract(images.cpu().float())

    @property
    def sha256(self) -> str:
        return weights_sha256(self._network)
