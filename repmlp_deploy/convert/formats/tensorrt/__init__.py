"""Build and refit TensorRT and TensorRT-RTX engines."""
