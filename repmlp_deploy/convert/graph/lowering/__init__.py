"""Lower an ONNX graph to a precision: casts for 16 bits, quantization for int8."""
