"""Faults planted in merging, folding, export, loading and the bundle: each is caught, and blamed at the right place.

`support.mutants` is the table. Every mutant replaces a function of the package by one with a mistake and runs the
real pipeline on a small network with random weights and BatchNorm statistics; the control is the same export without
it. The table is printed at the end.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from repmlp_deploy import Bundle, export
from repmlp_deploy.bundle import PROBE, Probe
from repmlp_deploy.card import ModelCard
from repmlp_deploy.convert.proof.certificate import recertify
from repmlp_deploy.convert.rework.locate import blame_bundle
from repmlp_deploy.errors import BundleError, VerificationError
from repmlp_deploy.nets.families import build_network
from support import faults
from support.bundles import certify_again
from support.mutants import CUT, EXPORT, FOLDING, LOADING, MERGING, MISLOADING, Mutant
from support.task_cases import filled, save_network

pytestmark = pytest.mark.slow  # many exports, seconds each


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
    assert blame_bundle(bundle, checkpoint(CUT), CUT).blame is None
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
    mutant = Mutant("float16 overflow", lambda _: None, "stages.1.0 · ffn_fc1", "float16 ends at 65504")
    table.check("export", mutant, lambda: export(path, card=CUT, precision="fp16", batch=2, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def bisect(bundle: Bundle, path: Path) -> None:
    """What `repmlp-verify --ckpt FILE --bisect` does."""
    blame = blame_bundle(bundle, path, CUT).blame
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
