"""nvmath.bindings.cusparseLt, imitated: signatures and enumerations of nvmath-python 1.0.0, and what the library demands of callers.

It works on addresses, as the real one does, so that a wrong pointer, size, order or layout is seen. It fails where something is used
after it was destroyed, is destroyed twice, or is destroyed before what was made of it.
"""

from __future__ import annotations

import ctypes
import enum
import sys
from importlib.machinery import ModuleSpec
from itertools import count
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from imitated import Library
from torch import Tensor

ENUMS = {
    "ComputeType": {"COMPUTE_32I": 0, "COMPUTE_16F": 1, "COMPUTE_32F": 2},
    "MatmulAlg": {"DEFAULT": 0},
    "MatmulAlgAttribute": {"CONFIG_ID": 0, "SPLIT_K": 3, "SPLIT_K_MODE": 4},
    "MatmulDescAttribute": {"ACTIVATION_GELU": 3, "BIAS_POINTER": 8},
    "Sparsity": {"SPARSITY_50_PERCENT": 0},
}
"""Those that are used; their numbers in nvmath-python 1.0.0."""
SIZES = {"ACTIVATION_GELU": 4, "BIAS_POINTER": 8, "CONFIG_ID": 4, "SPLIT_K": 4, "SPLIT_K_MODE": 4}
"""Bytes of an attribute, by `get_matmul_desc_attribute_dtype` and `get_matmul_alg_attribute_dtype`."""
SIGNATURES = {
    "init": 0,
    "get_property": 1,
    "structured_descriptor_init": 8,
    "dense_descriptor_init": 7,
    "mat_descriptor_destroy": 1,
    "matmul_descriptor_init": 8,
    "matmul_descriptor_destroy": 1,
    "matmul_desc_set_attribute": 5,
    "matmul_alg_selection_init": 3,
    "matmul_alg_selection_destroy": 1,
    "matmul_alg_set_attribute": 5,
    "matmul_plan_init": 3,
    "matmul_plan_destroy": 1,
    "matmul_get_workspace": 2,
    "matmul": 11,
}
"""How many arguments each function takes."""
TYPES = {14: torch.bfloat16, 2: torch.float16}


class cuSPARSELtError(Exception):
    pass


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The memory at `address`."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


class Bindings(ModuleType):
    """The module; `library` is the imitated cuSPARSELt behind it."""

    def __init__(self, library: Library, version: tuple[int, int, int]) -> None:
        super().__init__("nvmath.bindings.cusparseLt")
        self.library, self.version = library, version
        self.alive: dict[int, dict[str, Any]] = {}
        self.planned = self.multiplied = 0
        self.refuses_gelu = False
        self.ignores: set[str] = set()  # attributes that a faulty library would not act upon
        self.numbers = count(1)
        for name, members in ENUMS.items():
            setattr(self, name, enum.IntEnum(name, members))
        self.cuSPARSELtError = cuSPARSELtError

    def _new(self, kind: str, of: tuple[int, ...] = (), **facts: Any) -> int:
        for one in of:
            assert one in self.alive, f"{kind} of something that is gone"
        number = next(self.numbers)
        self.alive[number] = {"kind": kind, "of": of, **facts}
        return number

    def _end(self, number: int, kind: str) -> None:
        assert self.alive[number]["kind"] == kind
        users = [one["kind"] for one in self.alive.values() if number in one["of"]]
        assert not users, f"{kind} is destroyed before {users}"
        del self.alive[number]

    def init(self) -> int:
        return self._new("handle")

    def get_property(self, property_type: int) -> int:
        return self.version[property_type]

    def structured_descriptor_init(self, handle, rows, cols, ld, alignment, value_type, order, sparsity) -> int:
        assert (alignment, order, sparsity, ld) == (16, 2, 0, cols)
        return self._new(
            "matrix", (handle,), rows=rows, cols=cols, ld=ld, dtype=TYPES[value_type], order=order, sparse=True
        )

    def dense_descriptor_init(self, handle, rows, cols, ld, alignment, value_type, order) -> int:
        assert alignment == 16 and ld == (cols if order == 2 else rows)
        return self._new(
            "matrix", (handle,), rows=rows, cols=cols, ld=ld, dtype=TYPES[value_type], order=order, sparse=False
        )

    def mat_descriptor_destroy(self, mat_descr) -> None:
        self._end(mat_descr, "matrix")

    def matmul_descriptor_init(self, handle, op_a, op_b, mat_a, mat_b, mat_c, mat_d, compute_type) -> int:
        assert (op_a, op_b, compute_type) == (0, 1, 2) and mat_c == mat_d
        a, b, d = (self.alive[one] for one in (mat_a, mat_b, mat_d))
        assert a["sparse"] and not b["sparse"] and not d["sparse"] and b["order"] == 2
        assert a["cols"] == b["cols"] and (d["rows"], d["cols"]) == (a["rows"], b["rows"])
        assert b["rows"] % 8 == 0 and len({one["dtype"] for one in (a, b, d)}) == 1
        return self._new("matmul", (handle, mat_a, mat_b, mat_d), a=a, b=b, d=d, attributes={})

    def matmul_descriptor_destroy(self, matmul_descr) -> None:
        self._end(matmul_descr, "matmul")

    def _set(self, number: int, names: Any, attribute: int, data: int, data_size: int) -> None:
        name = names(attribute).name
        assert data_size == SIZES[name]
        kind = ctypes.c_int32 if data_size == 4 else ctypes.c_uint64
        self.alive[number]["attributes"][name] = kind.from_address(data).value

    def matmul_desc_set_attribute(self, handle, matmul_descr, matmul_attribute, data, data_size) -> None:
        self._set(matmul_descr, self.MatmulDescAttribute, matmul_attribute, data, data_size)

    def matmul_alg_selection_init(self, handle, matmul_descr, alg) -> int:
        assert alg == 0
        return self._new("selection", (handle, matmul_descr), attributes={})

    def matmul_alg_selection_destroy(self, alg_selection) -> None:
        self._end(alg_selection, "selection")

    def matmul_alg_set_attribute(self, handle, alg_selection, attribute, data, data_size) -> None:
        self._set(alg_selection, self.MatmulAlgAttribute, attribute, data, data_size)

    def matmul_plan_init(self, handle, matmul_descr, alg_selection) -> int:
        matmul, chosen = self.alive[matmul_descr], self.alive[alg_selection]["attributes"]
        if self.refuses_gelu and "ACTIVATION_GELU" in matmul["attributes"]:
            raise cuSPARSELtError("NOT_SUPPORTED")
        split = chosen.get("SPLIT_K", 1)
        if not (split == 1 or (split == -1 if self.library.capability[0] == 9 else split > 1)):
            raise cuSPARSELtError("the splitK value is not supported")
        self.planned += 1
        facts = {name: value for name, value in matmul["attributes"].items() if name not in self.ignores}
        return self._new("plan", (handle, matmul_descr, alg_selection), matmul=matmul, attributes=facts)

    def matmul_plan_destroy(self, plan) -> None:
        self._end(plan, "plan")

    def matmul_get_workspace(self, handle, plan) -> int:
        return 0

    def matmul(self, handle, plan, alpha, d_a, d_b, beta, d_c, d_d, workspace, streams, num_streams) -> None:
        its = self.alive[plan]
        a, b, d = (its["matmul"][one] for one in "abd")
        assert (ctypes.c_float.from_address(alpha).value, ctypes.c_float.from_address(beta).value) == (1.0, 0.0)
        assert d_c == d_d and workspace and num_streams == 1 and ctypes.c_uint64.from_address(streams).value == 0
        packed = at(d_a, (a["rows"], a["cols"]), a["dtype"])
        x = at(d_b, (b["rows"], b["ld"]), b["dtype"])
        with torch.no_grad():
            bias = its["attributes"].get("BIAS_POINTER")
            out = self.library.unpacked(packed) @ x.float().t()
            if bias is not None:
                out += at(bias, (a["rows"], 1), a["dtype"]).float()
            if its["attributes"].get("ACTIVATION_GELU"):
                out = F.gelu(out, approximate="tanh")
            out = out.t() if d["order"] == 1 else out
            at(d_d, tuple(out.shape), d["dtype"]).copy_(out)
        self.multiplied += 1


def install(monkeypatch: pytest.MonkeyPatch, library: Library, version: tuple[int, int, int] = (0, 8, 1)) -> Bindings:
    """Make it what is imported."""
    from compressor.lower import cusparselt_direct

    made = Bindings(library, version)
    nvmath, bindings, cusparse = (
        ModuleType(name) for name in ("nvmath", "nvmath.bindings", "nvmath.bindings.cusparse")
    )
    nvmath.CudaDataType = enum.IntEnum("CudaDataType", {"CUDA_R_16F": 2, "CUDA_R_16BF": 14})
    cusparse.Order = enum.IntEnum("Order", {"COL": 1, "ROW": 2})
    cusparse.Operation = enum.IntEnum("Operation", {"NON_TRANSPOSE": 0, "TRANSPOSE": 1})
    nvmath.bindings, bindings.cusparse, bindings.cusparseLt = bindings, cusparse, made
    for module in (nvmath, bindings, cusparse, made):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for cached in ("bindings", "_cusparse", "_number", "_handle"):
        function = getattr(cusparselt_direct, cached)
        function.cache_clear()
    return made
