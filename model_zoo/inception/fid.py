"""FID: torch-fidelity's port of the Inception network of 2015, with its published weights from a file of the user's."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.environment import resolve_device, usual_torch
from compressor.errors import CompressorError, UsageError, first_line
from compressor.files import file_sha256
from compressor.quality.metric import Metric
from compressor.weights import read_weights

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The file that published values are measured with. The digits at its end are the first of its SHA-256."""

_AT_ONCE = 64


class FID(Metric):
    """`fid`: for pictures of any size, 1 or 3 channels. Needs the extra `fid` and a weights file: --inception-weights."""

    name = "fid"
    weights_setting = "inception_weights"

    def __init__(self, weights: Path | None = None) -> None:
        self._network: nn.Module | None = None
        self._sha256 = ""
        if weights is not None:
            if not weights.is_file():
                raise UsageError(f"{weights}: no such file", f"fid takes {WEIGHTS}; give its path. {_NO_DOWNLOAD}")
            self._device = resolve_device("auto")
            self._network = _network(weights).to(self._device).eval()
            self._sha256 = file_sha256(weights)

    def with_weights(self, path: Path) -> FID:
        return FID(path)

    def measure_name(self, measure: str) -> str:
        return "sfid" if measure == "sfd" else measure

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The 2048 averages (n, 2048) before Inception's last layer, which resizes the images to 299x299 itself."""
        network = self._loaded()
        pieces = torch.split(as_rgb(images), _AT_ONCE)
        return torch.cat([network(piece.to(self._device))[0].float().cpu() for piece in pieces])

    @property
    def sha256(self) -> str:
        """The hash of the weights file."""
        self._loaded()
        return self._sha256

    def _loaded(self) -> nn.Module:
        if self._network is None:
            raise UsageError(
                f"fid needs the weights of Inception, the file {WEIGHTS}",
                f"Give its path with --inception-weights PATH. {_NO_DOWNLOAD}",
            )
        return self._network


_NO_DOWNLOAD = "Nothing is downloaded: it is the file of torch-fidelity, weights-inception-2015-12-05-6726825d.pth."


def as_rgb(images: Tensor) -> Tensor:
    """`images` (n, 1 or 3, height, width) in [-1, 1] as uint8 (n, 3, height, width), rounded as picture files are."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise CompressorError(
            f"fid takes images (n, 1 or 3, height, width), got {tuple(images.shape)}",
            "Choose another metric with --set evaluate.metric=NAME, or none with --set evaluate.metric=null",
        )
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1)


@usual_torch()
def _network(weights: Path) -> nn.Module:
    """torch-fidelity's network with the `weights`.

    It would read the file with a loader that runs what is in it, so it is given a copy of the tensors alone.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise CompressorError(
            f"fid needs torch-fidelity, which cannot be imported: {first_line(error)}",
            'pip install "diffusion-compressor[fid]"',
        ) from error
    state = read_weights(weights)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "inception.pth"
        torch.save(state, copy)
        try:
            network: nn.Module = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(copy)
            )
        except RuntimeError as error:  # of load_state_dict
            reason = " ".join(str(error).split())[:160]
            raise CompressorError(
                f"{weights} does not fit torch-fidelity's Inception: {reason}", f"fid takes {WEIGHTS}."
            ) from error
    return network
