import argparse
import gzip
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repmlp_deploy.bundle import hash_file
from repmlp_deploy.convert.source.checkpoint import OddTensor, Placeholder, read_checkpoint
from repmlp_deploy.errors import CheckpointError
from support.configs import Config


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "x.pth"
    torch.save({"fc3.weight": torch.arange(4096.0)}, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_both_kinds_of_files_are_read(tmp_path: Path, saved: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "y.safetensors")
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(saved).content["fc3.weight"], torch.arange(4096.0))
    assert torch.equal(read_checkpoint(tmp_path / "y.safetensors").content["a"], torch.ones(3))
    assert torch.equal(read_checkpoint(tmp_path / "old.pt").content["a"], torch.ones(3))
    assert len(read_checkpoint(saved).sha256) == 64


def test_missing_empty_and_folders(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.pth")
    (tmp_path / "empty.pth").touch()
    assert "is empty" in refusal(tmp_path / "empty.pth")
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (bytes(range(256)) * 8, "damaged"),
        (b"PK\x03\x04 and then nothing of an archive", "damaged"),
    ],
)
def test_what_people_mistake_for_weights_is_named(tmp_path: Path, suffix: str, content: bytes, said: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    assert said in refusal(path)


def test_packages_and_parts_are_named(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "x.pth.gz").write_bytes(gzip.compress(saved.read_bytes()))
    assert "is a gzip file: unpack it" in refusal(tmp_path / "x.pth.gz")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(saved, "x.pth")
    assert "is a tar archive: unpack it" in refusal(tmp_path / "x.tar")
    index = {"metadata": {"total_size": 12000}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    assert "is the index of a checkpoint in several files" in refusal(tmp_path / "model.safetensors.index.json")
    for name in ("model-00001-of-00002.safetensors", "model-00001-of-00001.safetensors"):
        save_file({"a": torch.ones(3000)}, tmp_path / name)
    said = "is named as a part of a checkpoint in several files: join them into one, or rename it if it is whole"
    assert said in refusal(tmp_path / "model-00001-of-00002.safetensors")
    assert read_checkpoint(tmp_path / "model-00001-of-00001.safetensors").content.keys() == {"a"}


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, saved: Path, keep: float) -> None:
    save_file({"a": torch.ones(3000)}, tmp_path / "y.safetensors")
    for path in (saved, tmp_path / "y.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        assert "damaged" in refusal(path)


def test_a_flipped_bit_in_a_tensor(saved: Path) -> None:
    """PyTorch's own reader does not check the archive's checksums."""
    data = bytearray(saved.read_bytes())
    position = data.find(torch.arange(4096.0).numpy().tobytes()[4000:4100])
    assert position > 0
    data[position] ^= 1
    saved.write_bytes(data)
    assert "checksum" in refusal(saved)


def test_duplicate_members(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"again")
    assert "same name" in refusal(saved)


def test_an_archive_that_would_unpack_to_far_more_than_its_size(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    assert "times its size" in refusal(path)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "run"

    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (marker,))

    torch.save({"model": Attack()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Attack()))
    content = read_checkpoint(tmp_path / "a.pth").content
    assert isinstance(content["model"], Placeholder)
    refusal(tmp_path / "b.pth")
    assert not marker.exists()


def test_objects_of_training_code_are_left_out_and_named(tmp_path: Path) -> None:
    """The official release saves its configuration beside the weights, other code its arguments and whole modules."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Sequential(torch.nn.BatchNorm2d(4)))
    content = {
        "model": {"w": torch.ones(2)},
        "config": Config(a=Config(b=1)),
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
        "whole": network,
    }
    for name, zipped in (("new.pth", True), ("old.pth", False)):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        read = read_checkpoint(tmp_path / name)
        assert read.replaced == ("argparse.Namespace", "support.configs.Config")
        assert torch.equal(read.content["model"]["w"], torch.ones(2))
        assert read.content["config"].content["a"].content == {"b": 1}
        state = network.state_dict()
        assert read.content["whole"].keys() == state.keys()
        assert all(torch.equal(read.content["whole"][key], value) for key, value in state.items())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_module_is_read_inside_what_torch_compile_made_of_it(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save({"model": torch.compile(network), "epoch": 3}, tmp_path / "x.pth")
    read = read_checkpoint(tmp_path / "x.pth").content["model"]
    assert read.keys() == network.state_dict().keys()
    assert torch.equal(read["0.weight"], network[0].weight)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_kind_of_tensor_is_read_as_pytorch_reads_it(tmp_path: Path, *, zipped: bool) -> None:
    base = torch.arange(24.0)
    content = {
        "transposed": base.reshape(4, 6).t(),
        "part": base[3:9],
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "integer": base.long(),
        "flag": base > 3,
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base),
        "negative": torch.randn(4, dtype=torch.cfloat).conj().imag,
        "negative parameter": torch.nn.Parameter(torch.randn(4, dtype=torch.cfloat).conj().imag),
        "negative part": torch.randn(3, 4, dtype=torch.cfloat).conj().imag.t()[1:3],
    }
    assert content["negative"].is_neg()
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "x.pth").content
    for key, value in torch.load(tmp_path / "x.pth", weights_only=True).items():
        assert read[key].dtype == value.dtype, key
        assert torch.equal(read[key], value), key


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_tensors_that_cannot_be_weights_keep_their_kind(tmp_path: Path) -> None:
    content = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
    }
    torch.save(content, tmp_path / "x.pth")
    read = read_checkpoint(tmp_path / "x.pth").content
    assert read["sparse"] == OddTensor("sparse")
    assert read["meta"] == OddTensor("without numbers")
    assert read["quantized"] == OddTensor("quantized")
    assert read["optimizer"]["state"][0]["exp_avg"] == OddTensor("of an optimizer")


def test_weights_named_like_the_state_of_an_optimizer_are_read(tmp_path: Path) -> None:
    network = torch.nn.ModuleDict({"upscaler": torch.nn.Linear(2, 2), "schedule": torch.nn.BatchNorm1d(2)})
    network["input_scaler"] = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1))
    network.optimism = torch.nn.Parameter(torch.ones(2))
    content = {"state_dict": network.state_dict(), "whole": network, "grad_scaler": {"scale": torch.ones(1)}}
    content["upscaler"] = network["upscaler"].state_dict()
    torch.save(content, tmp_path / "x.pth")
    read = read_checkpoint(tmp_path / "x.pth").content
    for found in (read["state_dict"], read["whole"]):
        assert found.keys() == network.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in network.state_dict().items())
    assert torch.equal(read["upscaler"]["weight"], network["upscaler"].weight)
    assert read["grad_scaler"]["scale"] == OddTensor("of an optimizer")


def nested_key() -> bytes:
    """A pickle of {((((…,),),),): 1}: hashing the key overflows the interpreter's stack."""
    return b"\x80\x02}(" + b")" + b"\x85" * 500_000 + b"K\x01u."


def doubled() -> bytes:
    """A pickle of lists that hold the list before twice, 60 levels deep: 2^60 leaves."""
    return b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60)) + b"."


def packed(data: bytes) -> bytes:
    """An archive with this pickle, as torch.save writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (nested_key(), "needs more than a checkpoint does"),
        (doubled(), "more than 500000 values"),
        (b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".", "nested deeper"),
        (b"\x80\x02]" + b"(" + b"N" * 1_000_000 + b"e.", "more than 500000 values"),
        (b"\x80\x02\x8a\x02\x00\x01\x8b\xff\xff\xff\x7f", "cannot be read"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read|more memory"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x00.", "cannot be read|more memory"),
        (b"", "cannot be read"),
    ],
    ids=["nested key", "doubled", "deep", "million", "long integer", "huge text", "huge frame", "empty"],
)
def test_a_pickle_that_would_crash_or_hang_the_reader(tmp_path: Path, pickled: bytes, said: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(packed(pickled))
    assert re.search(said, refusal(path))


def test_a_number_of_5000_digits_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(packed(pickle.dumps({"a": 10**5000}, 2)))
    assert read_checkpoint(tmp_path / "x.pth").content["a"] == Placeholder("a very large integer")


def test_kinds_of_files_that_are_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    assert "not a regular file" in refusal(tmp_path / "pipe.pth")
    assert "not a regular file" in refusal(Path("/dev/zero"))
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "nothing")
    assert "link to a file that does not exist" in refusal(tmp_path / "dangling.pth")
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    assert "cannot be read" in refusal(tmp_path / "loop.pth")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300 + ".pth"))
    with (tmp_path / "holes.pth").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(8 << 30)
    assert "mostly holes" in refusal(tmp_path / "holes.pth")


def test_a_tensor_that_claims_more_than_the_file_holds(tmp_path: Path, saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(name for name in members if name.endswith("data.pkl"))
    # BININT2 4096, the shape and the number of elements, becomes 65535
    members[root] = members[root].replace(b"M\x00\x10", b"M\xff\xff")
    with zipfile.ZipFile(tmp_path / "claims.pth", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert "ends early" in refusal(tmp_path / "claims.pth")


@pytest.mark.parametrize("kind", ["encrypted", "bzip2", "lzma"])
def test_archives_that_torch_save_never_writes(tmp_path: Path, saved: Path, kind: str) -> None:
    if kind == "encrypted":
        data = bytearray(saved.read_bytes())
        for header, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            place = data.find(header)
            while place >= 0:
                data[place + offset] |= 1
                place = data.find(header, place + 4)
        (tmp_path / "x.pth").write_bytes(data)
        assert "is encrypted" in refusal(tmp_path / "x.pth")
        return
    method = zipfile.ZIP_BZIP2 if kind == "bzip2" else zipfile.ZIP_LZMA
    with zipfile.ZipFile(tmp_path / "x.pth", "w", method) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    assert "compressed in a way" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_that_changes_between_its_digest_and_its_reading_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training run saves again, or a link is turned: the digest would be of other weights."""
    names = [tmp_path / f"{name}.{suffix}" for name in ("first", "second", "link")]
    for value, path in enumerate(names[:2]):
        state = {"a": torch.full((3,), float(value))}
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    names[2].symlink_to(names[0])

    def turning(path: Path) -> str:
        digest = hash_file(path)
        path.unlink()
        path.symlink_to(names[1])
        return digest

    monkeypatch.setattr("repmlp_deploy.convert.source.checkpoint.hash_file", turning)
    assert "was changed while it was read" in refusal(names[2])


def test_a_header_of_more_tensors_than_any_checkpoint_has_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((100 << 20).to_bytes(8, "little") + b"{" + bytes(1000))
    assert "more tensors than a checkpoint" in refusal(path)
