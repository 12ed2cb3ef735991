"""An ONNX file served by MLServer, in the peers' environment: what its users write."""

from __future__ import annotations

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    """Runs the file that the settings name."""

    async def load(self) -> bool:
        """Open the file."""
        self._session = onnxruntime.InferenceSession(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run a batch; MLServer gathers it."""
        batch = NumpyCodec.decode_input(payload.inputs[0])
        logits = self._session.run(None, {payload.inputs[0].name: batch})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])
