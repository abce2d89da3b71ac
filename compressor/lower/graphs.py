"""CUDA graphs: a forward recorded once and replayed, so that the host's cost of launching its kernels is gone.

On a GPU a small kernel takes less time than it takes to launch it, and a sparse product through cuSPARSELt plans itself anew
on every call. A replay is one launch for all of them, with the memory and the arguments of the recording.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from compressor.adapter import tensors_of
from compressor.errors import CompressorError, first_line

_WARM_UP = 3
_RECORDINGS = 4  # each keeps its own memory, so a wrapper takes a few shapes, not all that ever come


class Captured:
    """`forward(inputs)` as a CUDA graph: call it with other inputs like these, or `replay()` it as it is to time it.

    `inputs` is any nesting of tuples, lists and dicts; its tensors are on one GPU. They are copied, and so is what comes out;
    `replay()` copies nothing. The forward runs `warm_up` times before it is recorded, without which libraries would load, compile
    or tune themselves in the recording. Its parameters and all that it reads besides `inputs` must stay where they were; what
    `forward` holds is kept for that. Raises CompressorError where the forward cannot be recorded.

    Not for several threads or streams at once: a recording has one set of buffers.
    """

    def __init__(self, forward: Callable[[Any], Any], inputs: Any, warm_up: int = _WARM_UP) -> None:
        device = _device(tensors_of(inputs))
        if device is None:
            raise CompressorError("a CUDA graph needs inputs on one GPU", "Move every tensor of the inputs there.")
        self._inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)

        def run() -> Any:
            with torch.no_grad():
                return forward(self._inputs)

        # a graph owns the memory of its own results, and not that of the weights which it reads
        self._forward = forward
        try:
            self._replay, self._outputs = _recorded(run, device, warm_up)
        except Exception as error:  # whatever the model does that a graph cannot hold
            raise CompressorError(
                f"this forward cannot be recorded as a CUDA graph: {type(error).__name__}: {first_line(error)}",
                "A graph holds no copies from the CPU, no .item() and no shapes that depend on values.",
            ) from error
        for leaf in tree_leaves(self._outputs):
            # A tensor inside an unknown container would be overwritten by the next replay, in the caller's hands.
            if not (leaf is None or isinstance(leaf, (Tensor, int, float, str))):
                raise CompressorError(f"a recorded forward gave {type(leaf).__name__}", "Return tensors.")

    def replay(self) -> None:
        """Run it as it is, on the inputs that were last given. Whoever keeps this method keeps the weights, too."""
        self._replay()

    def __call__(self, inputs: Any) -> Any:
        """The outputs for `inputs`, which have the shapes and dtypes of the recorded ones, and the same other values."""
        for mine, given in zip(tensors_of(self._inputs), tensors_of(inputs), strict=True):
            mine.copy_(given)
        self.replay()
        return tree_map_only(Tensor, lambda tensor: tensor.clone(), self._outputs)


class Graphed(nn.Module):
    """`module`, for inference, with its calls recorded as CUDA graphs: one for each of the first few shapes that come.

    Everything else runs as it always did: further shapes, tensors off the GPU or that require gradients, autocast. Of
    the calls that can be recorded, the first raises CompressorError if recording fails; later ones whose recording fails run
    without it. Copies and moved modules record anew. Attributes that this wrapper lacks are the module's.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._recordings: dict[Any, Captured | None] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.module(*args, **kwargs)
        key = self._key(args, kwargs)
        if key is None:
            return self.module(*args, **kwargs)
        if key not in self._recordings and len(self._recordings) < _RECORDINGS:
            self._recordings[key] = self._record(args, kwargs)
        recording = self._recordings.get(key)
        return self.module(*args, **kwargs) if recording is None else recording((args, kwargs))

    def _record(self, args: Any, kwargs: Any) -> Captured | None:
        try:
            return Captured(lambda inputs: self.module(*inputs[0], **inputs[1]), (args, kwargs))
        except CompressorError:
            if not self._recordings:
                raise
            return None

    def _key(self, args: Any, kwargs: Any) -> Any:
        """What must be the same for a replay to be right; None where a call is not to be recorded."""
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = _device(tensors)
        if device is None or torch.is_autocast_enabled("cuda"):
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return None
        described = tuple(
            (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
        )
        key = (device, self.module.training, structure, described)
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _apply(self, fn: Any, recurse: bool = True) -> Graphed:
        self._recordings = {}  # moved or cast parameters lie elsewhere
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphed:
        return Graphed(copy.deepcopy(self.module, memo)).train(self.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recordings": {}}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)


def _device(tensors: Sequence[Tensor]) -> torch.device | None:
    """The one GPU that all of `tensors` are on; None where there is no such."""
    devices = {tensor.device for tensor in tensors}
    return next(iter(devices)) if len(devices) == 1 and next(iter(devices)).type == "cuda" else None


def _recorded(run: Callable[[], Any], device: torch.device, warm_up: int) -> tuple[Callable[[], None], Any]:
    """The replay of `run` on `device`, and the outputs that it writes each time. Warmed up on a side stream, as torch asks."""
    streams: Any = torch.cuda  # its classes have no annotations
    with torch.cuda.device(device):
        side = streams.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy batches meanwhile: only this thread's calls may break the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run()
    return graph.replay, outputs
