"""Peer: `torch.onnx.export` of the network as upstream merges it, straight into ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import time
import warnings

import onnxruntime as ort
import torch
from common import answer, arguments, images

from repmlp_deploy.bench.subjects.seeding import seeded_network
from repmlp_deploy.card import load_card
from repmlp_deploy.convert.reparam.merge import merge_branches, upstream_form


def main() -> None:
    """Export, load, time."""
    options = arguments(__doc__ or "")
    card = load_card(options.model)
    network = upstream_form(merge_branches(seeded_network(card)))
    inputs = images(options.batch, (3, *card.input_size))
    started = time.perf_counter()
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (torch.from_numpy(inputs),), dynamo=True, verbose=False)
    if program is None:
        raise SystemExit("torch.onnx.export returned nothing")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    data = program.model_proto.SerializeToString()
    session = ort.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    answer("naive ONNX export", options, lambda: session.run(None, {name: inputs}), time.perf_counter() - started)


if __name__ == "__main__":
    main()
