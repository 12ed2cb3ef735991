"""An ONNX file served by KServe's Python server, in the peers' environment: what its users write.

Usage: onnx_with_kserve.py NAME MODEL.onnx HTTP_PORT GRPC_PORT
"""

from __future__ import annotations

import sys

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class OnnxModel(Model):
    """Runs one file."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        self._session = onnxruntime.InferenceSession(path)
        self.ready = True

    def predict(self, payload: InferRequest, headers: dict[str, str] | None = None) -> InferResponse:  # noqa: ARG002
        """Run one request; this server gathers none."""
        given = payload.inputs[0]
        logits = self._session.run(None, {given.name: given.as_numpy()})[0]
        output = InferOutput("logits", list(logits.shape), "FP32")
        output.set_data_from_numpy(logits, binary_data=True)
        return InferResponse(payload.id, self.name, [output])


if __name__ == "__main__":
    name, path, http_port, grpc_port = sys.argv[1:]
    ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1).start([OnnxModel(name, path)])
