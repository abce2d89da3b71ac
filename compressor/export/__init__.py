"""Export: models as ONNX files, checked in ONNX Runtime."""
