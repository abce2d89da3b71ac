"""Export: models as ONNX files, checked in ONNX Runtime."""

from compressor.export.onnx import export_onnx as export_onnx
