"""Run ONNX graphs with ONNX Runtime."""
