"""Faults planted in merging, folding, export, loading and the bundle: each is caught, and blamed at the right place.

Every mutant replaces a function of the package by one with a mistake and runs the real pipeline on a small network with
random weights and BatchNorm statistics; the control is the same export without it. The table is printed at the end.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from repmlp_deploy import Bundle, export
from repmlp_deploy.bundle import MANIFEST, PROBE, Probe, hash_file
from repmlp_deploy.card import ModelCard, Preprocessing
from repmlp_deploy.convert.proof.certificate import recertify
from repmlp_deploy.convert.rework.locate import blame_bundle
from repmlp_deploy.errors import BundleError, CheckpointError, InputError, VerificationError
from repmlp_deploy.nets.families import build_network
from support import faults
from support.task_cases import filled, save_network, small_card

CUT = small_card("repmlpnet", input_size=(16, 24), depths=(1, 2), partitions=((4, 3), (2, 3)), kernels=(1, 3))
"""Two partitions in the first stage, one in the second, h ≠ w, 1 < S < C."""
SQUARE = small_card("repmlpnet", input_size=(24, 24), depths=(1, 1), partitions=((2, 3), (3, 1)), kernels=(3,))
"""Partitions that divide the map either way round."""
OF_2021 = ModelCard(
    name="small-pure-mlp",
    family="pure-mlp",
    task="classify",
    input_size=(12, 18),
    network={
        "channels": (4, 8),
        "depths": (1, 2),
        "partitions": ((4, 3), (2, 3)),
        "groups": (2, 4),
        "kernels": (1, 3),
        "classes": 5,
    },
    preprocessing=Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
)


@dataclass(frozen=True)
class Mutant:
    """A planted fault, and what must be said of it.

    Attributes:
        name: what was done.
        plant: does it.
        place: block and part to be named.
        fault: what must be said to have gone wrong.
        card: of the network.
        caught: the error that ends the export.
        batch: to export with.
    """

    name: str
    plant: faults.Plant
    place: str
    fault: str = ""
    card: ModelCard = CUT
    caught: type[Exception] = VerificationError
    batch: str = "2"


def is_3x3(_block: object, bn: object) -> bool:
    return bn is _block.repconv3.bn


MERGING = [
    Mutant(
        "branch dropped",
        faults.merged_fc3(faults.without_its_3x3_branch),
        "stages.1.0 · fc3 · branch repconv3",
        "dropped",
    ),
    Mutant("branch counted twice", faults.branch_counted_twice, "stages.0.0 · fc3 · branch repconv1", "doubled"),
    Mutant(
        "another eps in every BatchNorm",
        faults.norm_in_merge(lambda block, _bn: faults.wide(block), faults.with_another_eps),
        "stages.1.0 · fc3 · every BatchNorm",
        "eps 0.001 instead of 1e-05",
    ),
    Mutant(
        "variance used as deviation",
        faults.norm_in_merge(lambda block, bn: bn is block.fc3_bn, faults.with_variance_as_deviation),
        "stages.0.0 · fc3 · fc3_bn",
        "variance used as deviation",
    ),
    Mutant(
        "bias of a branch's BatchNorm forgotten",
        faults.norm_in_merge(lambda block, bn: faults.wide(block) and is_3x3(block, bn), faults.without_bias),
        "stages.1.0 · fc3 · branch repconv3",
        "bias forgotten",
    ),
    Mutant(
        "mean of a branch's BatchNorm forgotten",
        faults.norm_in_merge(lambda block, bn: bn is block.repconv1.bn, faults.without_mean),
        "stages.0.0 · fc3 · branch repconv1",
        "mean forgotten",
    ),
    Mutant(
        "padding off by one",
        faults.kernel_in_merge(faults.off_by_one),
        "stages.0.0 · fc3 · every branch",
        "padding off by one",
    ),
    Mutant(
        "Toeplitz matrix transposed",
        faults.kernel_in_merge(faults.transposed_toeplitz),
        "stages.0.0 · fc3 · branch repconv3",
        "Toeplitz matrix transposed",
    ),
    Mutant(
        "h and w swapped in the Toeplitz matrix",
        faults.merged_fc3(faults.with_edges_swapped),
        "stages.1.0 · fc3 · branch repconv3",
        "h and w swapped",
    ),
    Mutant(
        "h and w of the merged block swapped",
        faults.partition_swapped,
        "stages.1.0 · fc3 · partition",
        "h and w swapped: 1x3, expected 3x1",
        card=SQUARE,
    ),
    Mutant(
        "sharesets permuted",
        faults.merged_fc3(faults.changed_matrix(lambda matrix: matrix.roll(1, dims=0))),
        "stages.1.0 · fc3",
        "holds what belongs to shareset",
    ),
    Mutant(
        "FC3 transposed",
        faults.merged_fc3(faults.changed_matrix(lambda matrix: matrix.transpose(1, 2))),
        "stages.1.0 · fc3",
        "matrix transposed",
    ),
    Mutant(
        "one merged weight off by 1e-3",
        faults.merged_fc3(faults.changed_matrix(faults.perturb)),
        "stages.1.0 · fc3",
        "fc3.weight[2, 1, 4] is",
    ),
    Mutant(
        "BatchNorm left in training mode",
        faults.left_training,
        "stages.1.0 · prebn2",
        "BatchNorm2d is left in training mode",
    ),
    Mutant(
        "2021: shift of the pooled BatchNorm dropped",
        faults.pool_norm_in_merge,
        "stages.1.0 · global perceptron",
        "shift dropped",
        card=OF_2021,
    ),
    Mutant(
        "2021: kernel transposed",
        faults.kernel_in_merge_of_2021,
        "stages.0.0 · fc3 · branch repconv3",
        "kernel transposed",
        card=OF_2021,
    ),
    Mutant(
        "2021: convolution fused without the mean",
        faults.conv_fused_without_mean,
        "stem · bn fold",
        "mean forgotten",
        card=OF_2021,
    ),
]

FOLDING = [
    Mutant(
        "prebn1's shift dropped",
        faults.norm_in_fold("prebn1", faults.without_shift),
        "stages.1.0 · prebn1 fold",
        "shift dropped",
    ),
    Mutant(
        "prebn1 with variance as deviation",
        faults.norm_in_fold("prebn1", faults.with_variance_as_deviation),
        "stages.1.0 · prebn1 fold",
        "variance used as deviation",
    ),
    Mutant(
        "prebn2's mean forgotten",
        faults.norm_in_fold("prebn2", faults.without_mean),
        "stages.1.0 · prebn2 fold",
        "mean forgotten",
    ),
    Mutant(
        "gate of the map before prebn1", faults.gate_of_the_raw_map, "stages.1.0 · global perceptron", "not applied"
    ),
    Mutant(
        "gate applied before the shift",
        faults.gate_before_the_shift,
        "stages.0.0 · global perceptron",
        "gate applied before the shift",
    ),
    Mutant(
        "another eps behind the FFN's second convolution",
        faults.fused_in_fold(lambda conv: conv.in_channels == 64, faults.with_another_eps),
        "stages.1.0 · ffn_fc2 · bn fold",
        "eps 0.001 instead of 1e-05",
    ),
    Mutant(
        "downsampling without its BatchNorm's bias",
        faults.fused_in_fold(lambda conv: conv.kernel_size == (2, 2), faults.without_bias),
        "embeds.0 · bn fold",
        "bias forgotten",
    ),
    Mutant("head without its BatchNorm's shift", faults.head_without_shift, "head · head_norm fold", "shift dropped"),
]

EXPORT = [
    Mutant(
        "one weight of the graph off by 1e-3",
        faults.changed_graph(faults.weight_in_graph("stages.1.1.fc3")),
        "stages.1.1 · fc3",
        "stages.1.1.fc3[0, 0, 5] is",
    ),
    Mutant(
        "sharesets of the graph permuted",
        faults.changed_graph(faults.sharesets_of_the_graph),
        "stages.1.0 · fc3",
        "the graph holds another weight",
    ),
    Mutant(
        "GELU by its tanh approximation",
        faults.changed_graph(faults.gelu_by_tanh),
        "stages.1.0 · ffn",
        "computes something else",
    ),
    Mutant(
        "batch size baked into a reshape",
        faults.changed_graph(faults.batch_in_a_reshape),
        "stages.1.1",
        "Reshape",
        batch="1:2:4",
    ),
    Mutant(
        "batch size baked into the borders", faults.batch_at_the_borders, "input", "fails at batch 1", batch="1:2:4"
    ),
]

LOADING = [
    Mutant(
        "a key renamed",
        faults.loaded(faults.key_renamed),
        "stages.1.0.repmlp_block.fc3_bn.weight",
        "missing",
        caught=CheckpointError,
    ),
    Mutant(
        "loaded in training mode",
        faults.loaded_in_training_mode,
        "stages.1.0.prebn1",
        "training mode",
        caught=InputError,
    ),
]
"""What loading itself refuses."""

MISLOADING = [
    Mutant("FC3 loaded transposed", faults.loaded(faults.fc3_transposed), "stages.1.0 · fc3", "holds another weight"),
    Mutant(
        "prebn1 and prebn2 exchanged on loading",
        faults.loaded(faults.norms_exchanged),
        "stages.1.1 · global perceptron · fc1",
        "holds another weight",
    ),
    Mutant("ema weights for the model's", faults.ema_for_model, "conv_embedding", "holds another weight"),
]
"""What only the checkpoint can tell: the export trusts what it loads, `repmlp-verify --ckpt FILE --bisect` does not."""


class Table:
    """The lines, printed when the module's tests are over."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str, str]] = []
        self.missed: list[str] = []

    def check(self, where: str, mutant: Mutant, run: Callable[[], object]) -> None:
        """Require that `run` fails as it must, and that its message names the place and the fault."""
        self.missed.append(mutant.name)
        with pytest.raises(mutant.caught) as caught:
            run()
        said = str(caught.value)
        assert "\n" not in said
        assert f"first at {mutant.place}: " in said or mutant.caught is not VerificationError, said
        assert mutant.place in said, said
        assert mutant.fault in said, said
        self.missed.remove(mutant.name)
        self.add(where, mutant.name, type(caught.value).__name__, said)

    def add(self, where: str, name: str, how: str, said: str) -> None:
        said = re.sub(r"(/[\w.-]+)+/", "", said.rpartition("first at ")[2])  # without the folders of files
        self.lines.append((where, name, how, said))

    def __str__(self) -> str:
        widths = [max(len(line[i]) for line in self.lines) for i in range(3)]
        rows = [
            " ".join([f"{i:2}", *(f"{text:{n}}" for text, n in zip(line, widths, strict=False)), line[3][:150]])
            for i, line in enumerate(self.lines, 1)
        ]
        total = len(self.lines) + len(self.missed)
        missed = f"; missed: {', '.join(self.missed)}" if self.missed else ""
        return "\n".join(["", *rows, f"{len(self.lines)} of {total} mutants caught and blamed{missed}"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small wait longer for a second thread than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    lines = Table()
    yield lines
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        sys.stdout.write(f"{lines}\n")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelCard], Path]:
    """The checkpoint of a card: `model`, and for distraction `model_ema`."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}

    def make(card: ModelCard) -> Path:
        if id(card) not in paths:
            state = filled(build_network(card)).state_dict()
            ema = {key: value * 1.01 if value.is_floating_point() else value for key, value in state.items()}
            paths[id(card)] = folder / f"{len(paths)}.pth"
            torch.save({"model": state, "model_ema": ema}, paths[id(card)])
        return paths[id(card)]

    return make


@pytest.fixture(scope="module")
def control(checkpoint: Callable[[ModelCard], Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The unmutated export to ONNX: every hop passes, every value of the artifact is the checkpoint's."""
    bundle = export(checkpoint(CUT), card=CUT, batch="1:2:4", out=tmp_path_factory.mktemp("control") / "out")
    hops = bundle.manifest.certificate
    assert {hop.name for hop in hops} >= {"merged", "folded", "exported ONNX", "simplified ONNX"}
    assert all(hop.passed for hop in hops[1:])
    assert blame_bundle(bundle, checkpoint(CUT), CUT) is None
    return bundle


@pytest.mark.parametrize("mutant", [*MERGING, *FOLDING, *LOADING], ids=lambda mutant: mutant.name)
def test_a_fault_in_loading_merging_or_folding(
    mutant: Mutant,
    table: Table,
    checkpoint: Callable[[ModelCard], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = checkpoint(mutant.card)
    where = next(
        name for name, listed in (("merging", MERGING), ("folding", FOLDING), ("loading", LOADING)) if mutant in listed
    )
    good = export(path, card=mutant.card, formats="checkpoint", out=tmp_path / "control")
    assert [hop.name for hop in good.manifest.certificate if hop.passed]
    mutant.plant(monkeypatch)
    table.check(where, mutant, lambda: export(path, card=mutant.card, formats="checkpoint", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize("mutant", EXPORT, ids=lambda mutant: mutant.name)
def test_a_fault_in_the_export(
    mutant: Mutant,
    table: Table,
    checkpoint: Callable[[ModelCard], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    mutant.plant(monkeypatch)
    table.check("export", mutant, lambda: export(checkpoint(CUT), card=CUT, batch=mutant.batch, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("control")
def test_a_stale_simplified_graph_is_not_used(
    table: Table, checkpoint: Callable[[ModelCard], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faults.stale_simplified_graph(monkeypatch)
    bundle = export(checkpoint(CUT), card=CUT, batch=2, out=tmp_path / "out")
    note = next(note for note in bundle.manifest.notes if note.startswith("not simplified"))
    assert "onnxsim changed the output by" in note
    assert "first at conv_embedding: the graph holds another weight; conv_embedding.conv.weight[" in note
    assert not any(hop.name == "simplified ONNX" for hop in bundle.manifest.certificate)
    table.add("export", "stale simplified graph", "not used", note)


def test_float16_overflow(table: Table, tmp_path: Path) -> None:
    """Values between the convolutions of one FFN leave float16's range; every weight is inside it."""
    network = filled(build_network(CUT))
    ffn = network.stages[1][0].ffn_block
    with torch.no_grad():
        ffn.ffn_fc1.conv.weight *= 4
        ffn.ffn_fc1.bn.weight *= 2e4
        ffn.ffn_fc2.conv.weight *= 100
        ffn.ffn_fc2.bn.running_var.fill_(1e12)
    path = save_network(network, tmp_path / "large.pth")
    good = export(path, card=CUT, batch=2, out=tmp_path / "control")
    assert all(hop.passed for hop in good.manifest.certificate[1:])
    mutant = Mutant("float16 overflow", lambda _: None, "stages.1.0 · ffn", "not finite")
    table.check("export", mutant, lambda: export(path, card=CUT, precision="fp16", batch=2, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def bisect(bundle: Bundle, path: Path) -> None:
    """What `repmlp-verify --ckpt FILE --bisect` does."""
    blame = blame_bundle(bundle, path, CUT)
    if blame is not None:
        raise VerificationError(str(blame))


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize("mutant", MISLOADING, ids=lambda mutant: mutant.name)
def test_a_fault_that_only_the_checkpoint_can_tell(
    mutant: Mutant, table: Table, checkpoint: Callable[[ModelCard], Path], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutant.plant(patch)
        bundle = export(checkpoint(CUT), card=CUT, batch=mutant.batch, out=tmp_path / "out")
    table.check("loading", mutant, lambda: bisect(bundle, checkpoint(CUT)))


@pytest.fixture
def copied(control: Bundle, tmp_path: Path) -> Path:
    """The control's folder, to be tampered with."""
    return Path(shutil.copytree(control.folder, tmp_path / "bundle"))


def certify_again(folder: Path) -> Bundle:
    """Write the hashes of what lies there now into the manifest, as whoever exchanges a file on purpose would."""
    data = json.loads((folder / MANIFEST).read_text())
    for entry in [*data["artifacts"].values(), data["probe"]]:
        path = folder / entry["path"]
        entry |= {"sha256": hash_file(path), "bytes": path.stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(data))
    return Bundle.load(folder)


def replace_probe(folder: Path) -> None:
    probe = Probe.from_bytes((folder / PROBE).read_bytes())
    wrong = Probe(probe.inputs, probe.reference + 1e-3, probe.float32 + np.float32(1e-3))
    (folder / PROBE).write_bytes(wrong.to_bytes())


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)


def swap_artifact(folder: Path) -> None:
    """The artifact of a network of the same architecture, trained otherwise."""
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
            tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(0.9)).tobytes()
    onnx.save(model, folder / "model.onnx")


def perturb_artifact(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    faults.weight_in_graph("stages.1.0.gp.fc2.weight")(model)
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("name", "tamper", "file"),
    [("probe replaced", replace_probe, PROBE), ("bit of the artifact flipped", flip_a_bit, "model.onnx")],
)
def test_a_changed_file_is_not_read(
    name: str, tamper: Callable[[Path], None], file: str, copied: Path, table: Table
) -> None:
    recertify(Bundle.load(copied))
    tamper(copied)
    table.missed.append(name)
    with pytest.raises(BundleError, match="was changed: its sha256 is not the manifest's") as caught:
        recertify(Bundle.load(copied))
    assert file in str(caught.value)
    table.missed.remove(name)
    table.add("bundle", name, "BundleError", str(caught.value))


@pytest.mark.parametrize(
    ("tamper", "noticed", "mutant"),
    [
        (replace_probe, True, Mutant("probe replaced, manifest too", lambda _: None, "probe", "not the checkpoint's")),
        (
            swap_artifact,
            True,
            Mutant("artifact swapped, manifest too", lambda _: None, "conv_embedding", "holds another weight"),
        ),
        (
            perturb_artifact,
            False,
            Mutant(
                "one weight of the artifact off by 1e-3, manifest too",
                lambda _: None,
                "stages.1.0 · global perceptron · fc2",
                "stages.1.0.gp.fc2.weight[",
            ),
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_changed_file_with_a_changed_manifest(  # noqa: PLR0913 - one a fixture
    tamper: Callable[[Path], None],
    noticed: bool,
    mutant: Mutant,
    copied: Path,
    checkpoint: Callable[[ModelCard], Path],
    table: Table,
) -> None:
    tamper(copied)
    bundle = certify_again(copied)
    hops, _ = recertify(bundle)
    assert not noticed or not all(hop.passed for hop in hops if hop.passed is not None)
    table.check("bundle", mutant, lambda: bisect(bundle, checkpoint(CUT)))


def test_another_checkpoint_of_the_architecture(control: Bundle, table: Table, tmp_path: Path) -> None:
    other = filled(build_network(CUT))
    other.conv_embedding.bn.bias.data += 0.1
    mutant = Mutant("checked against another checkpoint", lambda _: None, "conv_embedding", "conv_embedding.conv.bias[")
    table.check("loading", mutant, lambda: bisect(control, save_network(other, tmp_path / "other.pth")))
