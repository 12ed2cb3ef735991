"""Export, simplify and lower the ONNX graph."""
