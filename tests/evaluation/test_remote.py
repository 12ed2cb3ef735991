"""Images behind a URI: `evaluation.remote` and what `evaluation.sources` makes of it."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from repmlp_deploy import Bundle, Predictor, reading
from repmlp_deploy.errors import ImageError, InputError
from repmlp_deploy.evaluation.mapping import map_images
from repmlp_deploy.evaluation.remote import RemoteFile, RemoteStore
from repmlp_deploy.evaluation.sources import open_source
from train_digits import digit_images

COUNT = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files in two folders, one file corrupt, and names that no image has."""
    folder = tmp_path_factory.mktemp("digits") / "in"
    for i, image in enumerate(digit_images()[0][:COUNT]):
        (folder / f"d{i % 2}").mkdir(parents=True, exist_ok=True)
        image.save(folder / f"d{i % 2}" / f"{i:02d}.png")
    (folder / "d1" / "03.png").write_bytes(b"no image")
    (folder / "d1" / ".hidden.png").write_bytes(b"")
    (folder / ".thumbnails" / "d0").mkdir(parents=True)
    (folder / ".thumbnails" / "d0" / "00.png").write_bytes(b"")
    (folder / "notes.txt").write_text("d0/00.png\nd1/01.png\nd1/gone.png\n")
    return folder


def as_kind(kind: str, images: Path, folder: Path) -> Path:
    """Return the images in another form, in the same order."""
    items = list(open_source(str(images)).items(0))
    if kind == "tar":
        with tarfile.open(folder / "shard.tar", "w") as archive:
            for item in items:
                archive.add(item.content, item.key)
        return folder / "shard.tar"
    if kind == "list":
        (folder / "list.txt").write_text("\n".join(str(item.content) for item in items))
        return folder / "list.txt"
    if kind == "parquet":
        both = [{"bytes": item.content.read_bytes(), "path": item.key} for item in items]
        pq.write_table(pa.table({"image": both}), folder / "table.parquet", row_group_size=7)
        return folder / "table.parquet"
    return images


@pytest.mark.parametrize("kind", ["folder", "tar", "list", "parquet"])
def test_a_uri_gives_the_table_of_the_path(kind: str, images: Path, bundle: Bundle, tmp_path: Path):
    given = as_kind(kind, images, tmp_path)
    source = open_source(given.as_uri())
    assert [item.key for item in source.items(13)] == [item.key for item in source.items(0)][13:]
    pickle.loads(pickle.dumps(source))
    with Predictor(bundle, format="onnx", threads=1) as predictor:
        found = map_images(predictor, source, tmp_path / "remote.parquet")
        map_images(predictor, open_source(str(given)), tmp_path / "local.parquet")
    assert (found.count, found.errors) == (COUNT, 1)
    columns = ["row", "key", "index", "label", "score", "top_indices", "top_scores"]
    tables = [pq.read_table(tmp_path / name, columns=columns) for name in ("remote.parquet", "local.parquet")]
    assert tables[0].equals(tables[1])


def test_a_loop_of_links_ends(images: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(images / "d0")
    (tmp_path / "loop").symlink_to(tmp_path)
    keys = [item.key for item in open_source(tmp_path.as_uri()).items(0)]
    assert keys == [item.key for item in open_source(str(tmp_path)).items(0)]
    assert len(keys) == COUNT / 2


def test_a_file_system_of_ones_own_works(images: Path, bundle: Bundle, tmp_path: Path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.png", (images / "d0" / "00.png").read_bytes())
    memory.pipe("/bucket/list.txt", b"a.png\ngone.png\n")
    found = [item.encoded() for item in open_source("fsspec+memory://bucket").items(0)]
    assert found == [(images / "d0" / "00.png").read_bytes()]
    with Predictor(bundle, format="onnx") as predictor:
        map_images(predictor, open_source("fsspec+memory://bucket/list.txt"), tmp_path / "out.parquet")
    first, second = pq.read_table(tmp_path / "out.parquet")["error"].to_pylist()
    assert first is None
    assert "no such file" in second


def test_a_list_opens_no_other_file_system(images: Path):
    store, path = RemoteStore.of(images.as_uri())
    assert isinstance(store.file(path, "s3://bucket/x.png", 10), ImageError)
    assert isinstance(store.file(path, "http://localhost/x.png", 10), ImageError)
    inside = store.file(path, (images / "d0" / "00.png").as_uri(), 1000)
    assert isinstance(inside, RemoteFile)
    assert inside.read() == (images / "d0" / "00.png").read_bytes()


def test_what_is_too_large_is_not_read_and_a_failure_ends_the_run(images: Path, monkeypatch):
    store, path = RemoteStore.of(images.as_uri())
    with pytest.raises(ImageError, match="expected at most 10"):
        store.file(path, "d0/00.png", 10).read()
    with pytest.raises(ValueError, match="larger than 5 bytes"):
        store.text(f"{path}/notes.txt", 5)
    calls, waits = [], []
    monkeypatch.setattr(reading.time, "sleep", waits.append)

    class Failing:
        def open_input_file(self, path: str) -> io.BytesIO:
            calls.append(path)
            raise OSError("connection reset")

    with pytest.raises(InputError, match="could not be read 4 times: connection reset; run again to go on"):
        RemoteFile(Failing(), "x", 10).read()
    assert len(calls) == 4
    assert waits == [0.2, 0.4, 0.8]


@pytest.mark.parametrize("uri", ["nosuch://a/b", "file:///no/such/folder", "file://", "gs://a b"])
def test_unusable_uris_are_one_line(uri: str):
    with pytest.raises(InputError, match="--data") as found:
        open_source(uri)
    assert "\n" not in str(found.value)
