import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from repmlp_deploy.convert.source.checkpoint import read_checkpoint
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


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "run"

    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (marker,))

    torch.save({"model": Attack()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Attack()))
    refusal(tmp_path / "a.pth")
    refusal(tmp_path / "b.pth")
    assert not marker.exists()


def test_a_configuration_object_is_named_with_the_way_out(tmp_path: Path) -> None:
    """The way out is a command that works as it stands."""
    path = tmp_path / "official.pth"
    torch.save({"model": {"w": torch.ones(2)}, "optimizer": {}, "config": Config(a=1)}, path)
    message = refusal(path)
    assert "support.configs.Config" in message
    command = message.split('python -c "')[1].rsplit('"', 1)[0]
    import subprocess
    import sys

    subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, check=True, env={"PYTHONPATH": str(Path(__file__).parents[2])}
    )
    content = read_checkpoint(tmp_path / "official-weights.pth").content
    assert list(content) == ["model"]
    assert torch.equal(content["model"]["w"], torch.ones(2))
