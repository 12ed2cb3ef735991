"""A model repository of NVIDIA Triton: `NAME/config.pbtxt`, `NAME/labels.txt`, `NAME/warmup/…`, `NAME/VERSION/…`.

Source: Triton's documentation, "Model Configuration". The configuration says what Triton could not tell by itself: the
batch sizes that were verified, dynamic batching within them, class names, and a warm-up with a sample of the probe, so
that no request pays for the first run.

With preprocessing there are two models more. `NAME-preprocess` turns decoded images into the network's input, and
`NAME-pixels` is the ensemble of both: its input is `image`, its outputs are the network's. The ensemble takes the
newest version of its steps, so that one configuration serves all versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from repmlp_deploy.bundle import Manifest, TensorSpec
from repmlp_deploy.errors import InputError
from repmlp_deploy.serving.repository.choice import Choice, ImageStep, Packed, computes_in

__all__ = ["pack"]

SERVER = "Triton"
_BACKENDS = {"onnx": "onnxruntime", "openvino": "openvino", "trt": "tensorrt"}
_TYPES = {
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int16": "TYPE_INT16",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
_PLACEHOLDER = b"A version of an ensemble is an empty folder, which some storages drop.\n"
_FILES = {"trt": ("model.plan",)}


def pack(choice: Choice) -> Packed:
    """Return the repository of one model.

    Raises:
        InputError: Triton cannot keep to the batch sizes that the bundle serves.
        BundleError: there is no artifact that Triton runs, or a file was changed.
    """
    choice.check()
    name, entry = choice.artifact(tuple(_BACKENDS), SERVER)
    manifest, bundle = choice.bundle.manifest, choice.bundle
    limit = _largest_batch(manifest)
    names = _FILES.get(name, tuple(file.path for file in (entry, *entry.companions)))
    contents = [bundle.read(file) for file in (entry, *entry.companions)]
    files = {f"{choice.version}/{path}": data for path, data in zip(names, contents, strict=True)}
    if _labels(manifest):
        files["labels.txt"] = "".join(f"{label}\n" for label in _labels(manifest)).encode()
    probe = bundle.probe()
    for spec, values in zip(manifest.inputs, (probe.inputs, *probe.further_inputs), strict=True):
        rows = values[:1] if limit else values[: manifest.batch.min]
        files[f"warmup/{spec.name}"] = rows.tobytes()
    files["config.pbtxt"] = _lines(_config(choice, _BACKENDS[name], limit))
    unchecked = [f"that this Triton has the {_BACKENDS[name]} backend"]
    if name == "trt":
        unchecked.append("that the plan was built for this GPU and this release of TensorRT")
    kind = computes_in(entry.precision)
    if kind != "f32" and name == "openvino":
        unchecked.append(
            f"that the backend computes in {kind}: the file holds float32, and {kind} is a hint of our runner"
        )
    placed = {f"{choice.model}/{path}": data for path, data in files.items()}
    if choice.images is not None:
        placed |= _ensemble(choice, choice.images, limit)
        unchecked += [
            f"that Triton's ONNX Runtime computes {choice.model}-preprocess as the one here did",
            f"that Triton runs the ensemble {choice.model}-pixels: nothing here does",
        ]
    return Packed(placed, choice.model, str(choice.version), tuple(unchecked))


def _largest_batch(manifest: Manifest) -> int:
    """Return `max_batch_size`: 0 for a graph whose batch is fixed, which Triton then takes as part of the shape."""
    batch = manifest.batch
    if batch.min == batch.max:
        return 0
    if batch.min > 1:
        raise InputError(
            f"{manifest.name} serves batches from {batch.min}, and Triton also sends single requests: "
            f"export it with --batch 1:{batch.opt}:{batch.max}"
        )
    return batch.max


def _labels(manifest: Manifest) -> tuple[str, ...]:
    """Return one name per logit, or nothing: a single logit stands for two classes, which Triton does not know."""
    labels = manifest.labels or ()
    return labels if (len(labels),) == manifest.output.shape[1:] else ()


def _config(choice: Choice, backend: str, limit: int) -> list[str]:
    manifest = choice.bundle.manifest
    lines = [f"name: {_text(choice.model)}", f"backend: {_text(backend)}", f"max_batch_size: {limit}"]
    for spec in manifest.inputs:
        lines += ["input {", *_tensor(spec, limit), "}"]
    for i, spec in enumerate(manifest.outputs):
        labels = ['  label_filename: "labels.txt"'] if i == 0 and _labels(manifest) else []
        lines += ["output {", *_tensor(spec, limit), *labels, "}"]
    if limit:
        delay = round(choice.max_delay_ms * 1000)
        lines += [
            "dynamic_batching {",
            f"  preferred_batch_size: {manifest.batch.opt}",
            f"  max_queue_delay_microseconds: {delay}",
            "}",
        ]
    lines += ["model_warmup {", '  name: "probe"', "  batch_size: 1"]  # Triton skips 0; a fixed batch is in the dims
    for spec in manifest.inputs:
        lines += ["  inputs {", f"    key: {_text(spec.name)}", "    value {"]
        lines += [f"    {line}" for line in _typed(spec, limit)]
        lines += [f"      input_data_file: {_text(spec.name)}", "    }", "  }"]
    return [*lines, "}"]


def _ensemble(choice: Choice, images: ImageStep, limit: int) -> dict[str, bytes]:
    """Return the files of the model that preprocesses and of the ensemble."""
    first, whole, outputs = f"{choice.model}-preprocess", f"{choice.model}-pixels", choice.bundle.manifest.outputs
    taken = {images.image.name, images.tensor.name} & {spec.name for spec in outputs}
    if taken:
        raise InputError(
            f"--preprocess names a tensor {taken.pop()}, and so does an output of {choice.model}: export it anew"
        )
    step = [f"name: {_text(first)}", f"backend: {_text(_BACKENDS['onnx'])}", f"max_batch_size: {limit}"]
    step += ["input {", *_tensor(images.image, limit), "}", "output {", *_tensor(images.tensor, limit), "}"]
    step += ["instance_group {", "  kind: KIND_CPU", "}"]  # where the graph was verified
    name = choice.bundle.manifest.input.name
    ensemble = [f"name: {_text(whole)}", 'platform: "ensemble"', f"max_batch_size: {limit}"]
    ensemble += ["input {", *_tensor(images.image, limit), "}"]
    for spec in outputs:
        ensemble += ["output {", *_tensor(spec, limit), "}"]
    ensemble += ["ensemble_scheduling {"]
    ensemble += _step(first, {images.image.name: images.image.name}, {images.tensor.name: images.tensor.name})
    ensemble += _step(choice.model, {name: images.tensor.name}, {spec.name: spec.name for spec in outputs})
    return {
        f"{first}/config.pbtxt": _lines(step),
        f"{first}/{choice.version}/model.onnx": images.graph,
        f"{whole}/config.pbtxt": _lines([*ensemble, "}"]),
        f"{whole}/{choice.version}/ensemble.txt": _PLACEHOLDER,
    }


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> list[str]:
    """Return a step of an ensemble; its maps lead from the model's tensors to the ensemble's."""
    lines = ["  step {", f"    model_name: {_text(model)}", "    model_version: -1"]
    for kind, tensors in (("input_map", inputs), ("output_map", outputs)):
        for key, value in tensors.items():
            lines += [f"    {kind} {{", f"      key: {_text(key)}", f"      value: {_text(value)}", "    }"]
    return [*lines, "  }"]


def _lines(lines: Sequence[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def _tensor(spec: TensorSpec, limit: int) -> list[str]:
    return [f"  name: {_text(spec.name)}", *_typed(spec, limit)]


def _typed(spec: TensorSpec, limit: int) -> list[str]:
    """Return the type and the shape of a tensor, without the batch if Triton adds it."""
    shape = spec.shape[1:] if limit else spec.shape
    return [f"  data_type: {_TYPES[spec.dtype]}", *(f"  dims: {-1 if edge is None else edge}" for edge in shape)]


def _text(value: str) -> str:
    """Return a string of protobuf's text format; JSON's escapes are among its own, except for surrogates."""
    return json.dumps(value)
