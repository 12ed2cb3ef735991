"""Load on a server: many connections, each with requests of its own, every answer compared with what it must be."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import numpy as np

from repmlp_deploy.serving.hosts.messages import SERVICE, message

__all__ = ["Load", "Outcome", "load_grpc", "load_http"]

Ask = Callable[[np.ndarray], Awaitable[np.ndarray | None]]


@dataclass
class Outcome:
    """What came of a load.

    Attributes:
        seconds: it took.
        latencies: of every answered request, in seconds.
        wrong: numbers of the requests with another answer than theirs.
        failed: numbers of the requests without an answer.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answered requests a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """Return a percentile of the latencies, in milliseconds."""
        return float(np.percentile(self.latencies, share) * 1e3)


@dataclass(frozen=True)
class Load:
    """What is sent, and what must come back.

    Attributes:
        model: that is asked.
        inputs: (N, …) float32; every sample is a request of its own.
        expected: (N, …) outputs.
        name: of the input.
        connections: at a time; each sends its share of the inputs one after another.
        tolerance: largest absolute difference of an answer from what is expected.
    """

    model: str
    inputs: np.ndarray
    expected: np.ndarray
    name: str = "images"
    connections: int = 16
    tolerance: float = 1e-4


async def _caller(ask: Ask, numbers: range, load: Load, out: Outcome) -> None:
    for number in numbers:
        start = time.perf_counter()
        answer = await ask(load.inputs[number : number + 1])
        if answer is None:
            out.failed.append(number)
            continue
        out.latencies.append(time.perf_counter() - start)
        expected = load.expected[number : number + 1]
        if answer.shape != expected.shape or np.abs(answer - expected).max() > load.tolerance:
            out.wrong.append(number)


async def _run(asks: list[Ask], load: Load) -> Outcome:
    out, each = Outcome(), len(load.inputs) // len(asks)
    start = time.perf_counter()
    shares = [range(i * each, (i + 1) * each) for i in range(len(asks))]
    await asyncio.gather(*(_caller(ask, share, load, out) for ask, share in zip(asks, shares, strict=True)))
    out.seconds = time.perf_counter() - start
    return out


async def load_http(address: str, load: Load) -> Outcome:
    """Send every input (N, …) as a request of its own over HTTP, with raw tensors."""
    host, _, port = address.removeprefix("http://").partition(":")
    item = {"name": load.name, "shape": [1, *load.inputs.shape[1:]], "datatype": "FP32"}
    item["parameters"] = {"binary_data_size": load.inputs[0].nbytes}
    header = json.dumps({"inputs": [item], "parameters": {"binary_data_output": True}}).encode()
    head = (
        f"POST /v2/models/{load.model}/infer HTTP/1.1\r\nHost: {host}\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(header) + load.inputs[0].nbytes}\r\n\r\n"
    ).encode()

    writers: list[asyncio.StreamWriter] = []

    async def opened() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        return reader, writer

    def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Ask:
        async def ask(batch: np.ndarray) -> np.ndarray | None:
            nonlocal reader, writer
            writer.write(b"".join((head, header, batch.tobytes())))
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
            fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
            if " 200 " not in lines[0]:  # the server may close, and say its error without a length
                reader, writer = await opened()
                return None
            body = await reader.readexactly(int(fields["content-length"]))
            described = int(fields["inference-header-content-length"])
            shape = json.loads(body[:described])["outputs"][0]["shape"]
            return np.frombuffer(body[described:], np.float32).reshape(shape)

        return ask

    try:
        return await _run([connection(*await opened()) for _ in range(load.connections)], load)
    finally:
        for writer in writers:
            writer.close()


async def load_grpc(address: str, load: Load) -> Outcome:
    """Send every input (N, …) as a request of its own over gRPC, with raw tensors."""
    request, response = message("ModelInferRequest"), message("ModelInferResponse")
    tensor = {"name": load.name, "datatype": "FP32", "shape": [1, *load.inputs.shape[1:]]}

    def connection(channel: grpc.aio.Channel) -> Ask:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer", lambda m: m.SerializeToString(), response.FromString)

        async def ask(batch: np.ndarray) -> np.ndarray | None:
            asked = request(model_name=load.model, inputs=[tensor], raw_input_contents=[batch.tobytes()])
            try:
                answer = await call(asked, timeout=60)
            except grpc.aio.AioRpcError:
                return None
            return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)

        return ask

    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection for every channel
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(load.connections)]
    try:
        return await _run([connection(channel) for channel in channels], load)
    finally:
        for channel in channels:
            await channel.close()
