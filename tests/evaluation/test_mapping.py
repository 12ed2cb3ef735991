"""`repmlp-map`: `evaluation.mapping`, `evaluation.filling`, `evaluation.sources`, `evaluation.tables`, `cli.map`."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from repmlp_deploy import Bundle, Predictor, files, reading
from repmlp_deploy.cli import map as map_cli
from repmlp_deploy.cli.map import map_command
from repmlp_deploy.errors import ImageError, InputError, OutputError
from repmlp_deploy.evaluation import filling, mapping, tables
from repmlp_deploy.evaluation.filling import bundle_digest
from repmlp_deploy.evaluation.mapping import map_images
from repmlp_deploy.evaluation.sources import open_source
from support.commands import ends_with
from train_digits import digit_images

COUNT = 100
CORRUPT = (7, 50, 99)

KILLED = """
import os, signal, sys
from pathlib import Path
from repmlp_deploy import Predictor
from repmlp_deploy.evaluation import filling, mapping
from repmlp_deploy.evaluation.sources import open_source

bundle, data, out, when, after = sys.argv[1:]
mapping.PART = 16
calls, put = [], mapping.put_file

def put_and_die(written, target):
    calls.append(target)
    if len(calls) == int(when) and after == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    put(written, target)
    if len(calls) == int(when):
        os.kill(os.getpid(), signal.SIGKILL)

filling.put_file = mapping.put_file = put_and_die
with Predictor(bundle, format="onnx") as predictor:
    mapping.map_images(predictor, open_source(data), Path(out))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files, three of them corrupt in different ways."""
    folder = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(digit_images()[0][:COUNT]):
        (folder / str(i % 3)).mkdir(exist_ok=True)
        image.save(folder / str(i % 3) / f"{i:03d}.png")
    files = open_source(str(folder)).items(0)
    for number, item in enumerate(list(files)):
        if number in CORRUPT:
            whole = item.content.read_bytes()
            item.content.write_bytes({7: b"", 50: b"no image", 99: whole[: len(whole) // 2]}[number])
    return folder


@pytest.fixture
def predictor(bundle: Bundle):
    with Predictor(bundle, format="onnx") as opened:
        yield opened


def require_right(table: pa.Table, contents: list[Path | bytes], predictor: Predictor) -> None:
    """Raise unless every row is what `Predictor` returns for the image, or its reason for a corrupt one."""
    assert table["row"].to_pylist() == list(range(len(contents)))
    assert set(table["bundle"].to_pylist()) == {bundle_digest(predictor.manifest)}
    for number, (row, content) in enumerate(zip(table.to_pylist(), contents, strict=True)):
        if number in CORRUPT:
            assert "not a readable image" in row["error"]
            assert row["index"] is row["score"] is row["top_indices"] is None
            continue
        expected = predictor(content)
        assert row["error"] is None
        assert (row["index"], row["label"]) == (expected.pred_label, expected.pred_class)
        assert row["top_indices"] == [index for index, _ in expected.top(5)]
        np.testing.assert_allclose(row["top_scores"], [score for _, score in expected.top(5)], rtol=1e-5, atol=1e-7)
        assert row["score"] == row["top_scores"][0]


def as_kind(kind: str, images: Path, folder: Path) -> str:
    """Return the images in another form, in the same order."""
    items = list(open_source(str(images)).items(0))
    files, keys = [item.content for item in items], [item.key for item in items]
    encoded = [file.read_bytes() for file in files]
    path = folder / {"list": "list.txt", "tar": "shard.tar", "tgz": "shard.tar.gz"}.get(kind, f"table.{kind}")
    if kind == "list":
        path.write_text("\n".join(map(str, files)))
    elif kind in {"tar", "tgz"}:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as archive:
            for file, key in zip(files, keys, strict=True):
                archive.add(file, key)
            archive.add(__file__, "about.txt")
    elif kind == "parquet":
        pq.write_table(pa.table({"id": range(len(keys)), "image": encoded}), path, row_group_size=30)
    elif kind == "feather":
        pa.feather.write_feather(pa.table({"path": [str(file) for file in files]}), path)
    elif kind == "arrow":
        both = [{"bytes": data, "path": key} for data, key in zip(encoded, keys, strict=True)]
        with pa.ipc.new_file(
            path, pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
        ) as file:
            file.write_table(pa.table({"image": both}))
    else:
        return f"{images}/**/*.png" if kind == "glob" else str(images)
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "glob", "list", "tar", "tgz", "parquet", "feather", "arrow"])
def test_every_source_gives_the_rows_of_predictor(kind, images, predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(mapping, "PART", 32)
    items = list(open_source(str(images)).items(0))
    source = open_source(as_kind(kind, images, tmp_path))
    out, told = tmp_path / "out.parquet", []
    found = map_images(predictor, source, out, progress=lambda *said: told.append(said))
    assert (found.count, found.resumed, found.errors) == (COUNT, 0, 3)
    assert told == [(32, COUNT, 1), (64, COUNT, 2), (96, COUNT, 2), (100, COUNT, 3)]
    table = pq.read_table(out)
    require_right(table, [item.content for item in items], predictor)
    if kind in {"folder", "tar", "tgz", "arrow"}:
        assert table["key"].to_pylist() == [item.key for item in items]
    assert not (tmp_path / "out.parquet.parts").exists()
    assert [item.key for item in source.items(90)] == [item.key for item in source.items(0)][90:]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize(("when", "after"), [(1, "before"), (3, "after"), (7, "after"), (8, "before"), (8, "after")])
def test_a_killed_run_goes_on(when, after, images, predictor, tmp_path, monkeypatch):  # noqa: PLR0913 - fixtures
    out = tmp_path / "out.parquet"
    command = [sys.executable, "-c", KILLED, predictor.bundle.folder, images, out, str(when), after]
    killed = subprocess.run(command, capture_output=True, check=False, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    monkeypatch.setattr(mapping, "PART", 16)
    found = map_images(predictor, open_source(str(images)), out)
    done = when - (after == "before")
    assert found.resumed == min(16 * done, COUNT)
    assert found.errors == len(CORRUPT)  # of the whole output, whichever run met them
    assert found.new_errors == sum(number >= found.resumed for number in CORRUPT)
    require_right(pq.read_table(out), [item.content for item in open_source(str(images)).items(0)], predictor)
    assert not (tmp_path / "out.parquet.parts").exists()


def test_jobs_do_not_mix(images, predictor, tmp_path):
    out, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    source = open_source(str(images))
    map_images(predictor, source, out)
    again = map_images(predictor, source, out)
    assert (again.resumed, again.errors, again.new_errors) == (COUNT, len(CORRUPT), 0)
    with pytest.raises(InputError, match="other options: pass --fresh"):
        map_images(predictor, source, out, top=2)
    assert map_images(predictor, source, out, top=2, fresh=True).resumed == 0
    assert len(pq.read_table(out)["top_scores"][0]) == 2
    out.unlink()
    parts.mkdir()
    (parts / "job.json").write_text(json.dumps({"job": "another"}))
    (parts / "000000000000.parquet").write_bytes(b"another's")
    with pytest.raises(InputError, match="pass --fresh to discard it"):
        map_images(predictor, source, out)
    (parts / "job.json").unlink()  # a folder whose removal was interrupted: its parts are nobody's
    assert map_images(predictor, source, out).resumed == 0
    listed = tmp_path / "notes.txt"
    listed.write_text("no table")
    with pytest.raises(InputError, match="exists"):
        map_images(predictor, source, listed)
    assert listed.read_text() == "no table"
    assert not (tmp_path / "notes.txt.parts").exists()


def test_a_file_that_no_run_wrote_stays(images, predictor, tmp_path):
    """Also with `--fresh`: it may be the table that the images come from."""
    table, notes, empty = tmp_path / "table.parquet", tmp_path / "notes.txt", tmp_path / "empty.parquet"
    pq.write_table(pa.table({"image": [path.read_bytes() for path in sorted(images.rglob("*.png"))[:3]]}), table)
    notes.write_text("no table")
    for out in (table, notes):
        before = out.read_bytes()
        with pytest.raises(InputError, match=f"{out.name} exists, and is no readable table of repmlp-map"):
            map_images(predictor, open_source(str(table)), out, fresh=True)
        assert out.read_bytes() == before
        assert not out.with_name(f"{out.name}.parts").exists()
    empty.touch()
    assert map_images(predictor, open_source(str(table)), empty).count == 3


def parts_of_a_stopped_run(source, predictor, out):
    """Stop a run when all of its parts are made; return them."""

    def stop(done, total, _errors):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_images(predictor, source, out, progress=stop)
    return sorted(out.with_name(f"{out.name}.parts").glob("*.parquet"))


def test_a_damaged_part_is_made_again(images, predictor, tmp_path):
    out, source = tmp_path / "out.parquet", open_source(str(images))
    first, second, third, *_ = parts_of_a_stopped_run(source, predictor, out)
    first.write_bytes(first.read_bytes()[:-20])
    second.write_bytes(b"")
    content = bytearray(third.read_bytes())
    content[4:60] = bytes(56)  # pages, which are not read before the parts are joined
    third.write_bytes(content)
    with pytest.raises(InputError, match=r"was damaged, and is removed .*: run the same command to make it again"):
        map_images(predictor, source, out)
    assert map_images(predictor, source, out).resumed == COUNT - 32
    require_right(pq.read_table(out), [item.content for item in source.items(0)], predictor)


def test_a_disk_that_fails_damages_no_part(images, predictor, tmp_path, monkeypatch):
    out, source = tmp_path / "out.parquet", open_source(str(images))
    parts = parts_of_a_stopped_run(source, predictor, out)
    read_table = tables.pa.parquet.read_table

    def failing(path, **how):
        if path == parts[1]:
            raise OSError(errno.EIO, "Input/output error")
        return read_table(path, **how)

    monkeypatch.setattr(tables.pa.parquet, "read_table", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        map_images(predictor, source, out)
    assert all(part.is_file() for part in parts)
    monkeypatch.undo()
    assert map_images(predictor, source, out).resumed == COUNT


def test_a_folder_of_another_program_among_the_parts_is_no_fault(images, predictor, tmp_path):
    out, source = tmp_path / "out.parquet", open_source(str(images))
    parts_of_a_stopped_run(source, predictor, out)[0].parent.joinpath(".checkpoints", "more").mkdir(parents=True)
    for _ in range(2):
        assert map_images(predictor, source, out).count == COUNT
    assert not (tmp_path / "out.parquet.parts").exists()


def test_a_damaged_result_is_said(images, predictor, tmp_path):
    out, source = tmp_path / "out.parquet", open_source(str(images))
    map_images(predictor, source, out)
    content = bytearray(out.read_bytes())
    group = pq.read_metadata(out).row_group(0)
    errors = group.column(group.num_columns - 1)
    assert errors.path_in_schema == "error"
    start = errors.dictionary_page_offset or errors.data_page_offset
    content[start : start + errors.total_compressed_size] = bytes(errors.total_compressed_size)
    out.write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged .*: pass --fresh"):
        map_images(predictor, source, out)
    assert map_images(predictor, source, out, fresh=True).count == COUNT


def test_a_run_that_waited_for_another_goes_on(images, predictor, tmp_path, monkeypatch):
    """The first run removes the folder with the lock that the second waits for."""
    out, source, found = tmp_path / "out.parquet", open_source(str(images)), []
    waits, wait_for = threading.Event(), files._wait_for

    def wait_and_tell(file):
        if threading.current_thread().name.startswith("second"):
            waits.set()
        wait_for(file)

    monkeypatch.setattr(files, "_wait_for", wait_and_tell)

    def wait(_done, _total, _errors):
        if not found:
            found.append(pool.submit(map_images, predictor, source, out, fresh=True))
            assert waits.wait(30)

    with ThreadPoolExecutor(1, thread_name_prefix="second") as pool:
        map_images(predictor, source, out, progress=wait)
        assert found[0].result(timeout=60).count == COUNT
    require_right(pq.read_table(out), [item.content for item in source.items(0)], predictor)
    assert not (tmp_path / "out.parquet.parts").exists()


def test_a_changed_image_is_another_job(images, tmp_path):
    copy = tmp_path / "one.png"
    copy.write_bytes((next(images.rglob("*.png"))).read_bytes())
    before = open_source(str(tmp_path)).fingerprint
    os.utime(copy, ns=(1, 1))
    assert open_source(str(tmp_path)).fingerprint != before


def test_unusable_sources_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(InputError, match="holds no images"):
        open_source(str(tmp_path))
    (tmp_path / "a.PNG").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"a\.PNG is one image; give a folder, a glob or a list"):
        open_source(str(tmp_path / "a.PNG"))
    for name in ("x.tar", "x.parquet", "x.arrow", "x.tgz"):
        (tmp_path / name).write_bytes(b"damaged" * 100)
        with pytest.raises(InputError, match="cannot be read"):
            open_source(str(tmp_path / name))
    pq.write_table(pa.table({"id": [1]}), tmp_path / "ids.parquet")
    with pytest.raises(InputError, match="no column image or bytes or path; it has id: name one with --column"):
        open_source(str(tmp_path / "ids.parquet"))
    with pytest.raises(InputError, match="column id is int64"):
        open_source(str(tmp_path / "ids.parquet"), "id")
    struct = pa.struct({"bytes": pa.binary_view(), "path": pa.string_view()})
    views = pa.table({"views": pa.array([{"bytes": b"x", "path": "y"}], struct)})
    pyarrow.feather.write_feather(views, tmp_path / "views.arrow", compression="uncompressed")
    assert [item.content for item in open_source(str(tmp_path / "views.arrow"), "views").items(0)] == [b"x"]
    with_query = (tmp_path / "views.arrow").as_uri() + "?a=b"
    assert open_source(with_query, "views").count == 1, "what a URI adds to a name makes a table no less one"
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "list.txt").write_text("a.png")
    for name in ("folder.parquet", "list.txt"):
        with pytest.raises(InputError, match=r"--column id names a column of a table; --data .* is none"):
            open_source(str(tmp_path / name), "id")


@pytest.mark.parametrize(
    ("value", "usable"),
    [
        ({"bytes": b"x", "path": "a.png"}, True),
        ({"bytes": None, "path": "a.png"}, True),
        ({"bytes": b"x"}, True),
        ({"data": b"x"}, False),
        ({"bytes": [1, 2], "path": "a.png"}, False),
        ({"bytes": None, "path": None}, False),
    ],
)
def test_a_structure_without_bytes_or_path_is_refused(value, usable, tmp_path):
    pq.write_table(pa.table({"image": [value]}), tmp_path / "x.parquet")
    if usable:
        assert open_source(str(tmp_path / "x.parquet")).count == 1
    else:
        with pytest.raises(InputError, match=r"column image is struct<.*; expected encoded images, paths, or both"):
            open_source(str(tmp_path / "x.parquet"))


def test_a_row_without_an_image_and_a_missing_file_are_rows(predictor, tmp_path):
    pq.write_table(pa.table({"path": [None, "gone.png"]}), tmp_path / "x.parquet")
    map_images(predictor, open_source(str(tmp_path / "x.parquet")), tmp_path / "out.parquet")
    first, second = pq.read_table(tmp_path / "out.parquet")["error"].to_pylist()
    assert first == "row 0 holds no image"
    assert "no such file" in second


def test_a_disk_that_fails_ends_the_run_instead_of_becoming_a_row(images, predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(reading.time, "sleep", lambda _seconds: None)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(next(images.rglob("001.png")).read_bytes())
    read_bytes = Path.read_bytes

    def failing(path):
        if path.suffix == ".png":
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    source, out = open_source(str(tmp_path / "in")), tmp_path / "out.parquet"
    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(InputError, match=r"a\.png could not be read 4 times"):
        map_images(predictor, source, out)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert map_images(predictor, source, out).errors == 0, "the same command goes on"


def test_links_to_folders_are_followed(images, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "012":
        (tmp_path / "in" / name).symlink_to(images / name)
    linked, plain = (open_source(str(folder)) for folder in (tmp_path / "in", images))
    assert [item.key for item in linked.items(0)] == [item.key for item in plain.items(0)]


def test_links_in_a_compressed_archive_are_rows_with_an_error(images, tmp_path):
    """Each would be read from the archive's beginning, in time that grows with the square of their number."""
    encoded = next(images.rglob("001.png"))
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(encoded, "home/.cache/a.png")
        member = tarfile.TarInfo("b.png")
        member.type, member.linkname = tarfile.LNKTYPE, "home/.cache/a.png"
        archive.addfile(member)
    first, second = open_source(str(tmp_path / "x.tar.gz")).items(0)
    assert first.content == encoded.read_bytes(), "the folder that was packed may be hidden"
    assert "--hard-dereference" in str(second.content)


@pytest.mark.parametrize("stream", [False, True])
def test_links_in_an_archive_have_rows_and_hidden_names_have_none(stream, images, tmp_path):
    """Hard links give the content they share, where the archive can be read again; `./` hides nothing."""
    encoded = next(images.rglob("001.png")).read_bytes()
    (tmp_path / "blob").write_bytes(encoded)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "blob", "./blob")
        archive.add(tmp_path / "blob", "./._a.png")
        archive.add(tmp_path / "blob", "./a.png")
        for name, kind, target in (("b", tarfile.LNKTYPE, "./blob"), ("c", tarfile.SYMTYPE, "a.png")):
            member = tarfile.TarInfo(f"./{name}.png")
            member.type, member.linkname = kind, target
            archive.addfile(member)
        archive.add(tmp_path / "blob", "./d.png")
    source = open_source((tmp_path / "x.tar").as_uri() if stream else str(tmp_path / "x.tar"))
    items = list(source.items(0))
    assert [item.key for item in items] == ["./a.png", "./b.png", "./c.png", "./d.png"]
    assert source.count == 4
    assert [item.content for item in items if isinstance(item.content, bytes)] == [encoded] * (2 if stream else 3)
    assert "is a link to a.png in the archive: pack it with tar --dereference" in str(items[2].content)
    assert isinstance(items[1].content, ImageError) == stream
    assert [item.key for item in source.items(2)] == ["./c.png", "./d.png"]


@pytest.mark.parametrize("pattern", ["**/*.png", "*/*.png", "2/*.png"])
def test_a_glob_passes_over_no_folder_that_cannot_be_read(pattern, images, monkeypatch):
    scandir = os.scandir

    def refusing(place):
        if str(place).rstrip("/").endswith("/2"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"cannot be read: .*Permission denied: .*/2"):
        open_source(f"{images}/{pattern}")
    assert open_source(f"{images}/1/*.png").count


def test_the_command_counts_and_refuses(images, bundle, tmp_path, capsys):
    out = tmp_path / "out.parquet"
    given = (bundle.folder, "--data", images, "--out", out, "--format", "onnx", "--json")
    assert ends_with(map_command, *given) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["count"], report["resumed"], report["errors"], report["new_errors"]) == (COUNT, 0, 3, 3)
    assert ends_with(map_command, *given, "--top", 3) == 2
    assert "pass --fresh" in capsys.readouterr().err
    assert ends_with(map_command, *given, "--top", 0) == 2
    capsys.readouterr()
    assert ends_with(map_command, *given[:-1]) == 0
    assert "note: 3 without a prediction, 0 of them new;" in capsys.readouterr().out


def test_an_interruption_is_one_error(images, bundle, tmp_path, capsys, monkeypatch):
    def stop(*_said, **_how):
        raise KeyboardInterrupt

    monkeypatch.setattr(map_cli, "map_images", stop)
    out = tmp_path / "out.parquet"
    assert ends_with(map_command, bundle.folder, "--data", images, "--out", out, "--format", "onnx") == 130
    assert capsys.readouterr().err == "note: run the same command again to go on\nerror: interrupted\n"


def test_without_pyarrow_the_remedy_is_named(images, bundle, tmp_path):
    script = "import sys; sys.modules['pyarrow'] = None; from repmlp_deploy.cli.shared.entry import run; run('map')"
    given = [str(bundle.folder), "--data", str(images), "--out", str(tmp_path / "out.parquet")]
    done = subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert 'pip install "repmlp-deploy[map]"' in done.stderr.splitlines()[-1]


def test_the_batch_is_part_of_the_job_and_a_folder_is_no_output(images, predictor, tmp_path):
    out, source = tmp_path / "out.parquet", open_source(str(images))
    with pytest.raises(OutputError, match="is a folder; expected the name of a parquet file"):
        map_images(predictor, source, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="is no regular file; expected the name of a parquet file"):
        map_images(predictor, source, tmp_path / "pipe", fresh=True)  # as root, /dev/null became a parquet file
    map_images(predictor, source, out, batch=2)
    with pytest.raises(InputError, match="other options: pass --fresh"):
        map_images(predictor, source, out, batch=4)
    with pytest.raises(OutputError, match=r"--out s3:/bucket/out.parquet is a URI; expected a file of this machine"):
        map_images(predictor, open_source(str(images)), Path("s3://bucket/out.parquet"))


def test_keys_are_stored_as_they_are(images, predictor, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["a  b   c.png", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        (folder / name).write_bytes(next(images.rglob("001.png")).read_bytes())
    map_images(predictor, open_source(str(folder)), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["key"].to_pylist() == ["a  b   c.png", "caf\\udce9.png"]


def test_the_bundle_is_hashed_once_for_all_images(images, predictor, tmp_path, monkeypatch):
    calls = []
    for module in (mapping, filling):
        monkeypatch.setattr(module, "bundle_digest", lambda manifest: calls.append(1) or bundle_digest(manifest))
    map_images(predictor, open_source(str(images)), tmp_path / "out.parquet", batch=2)
    assert len(calls) == 2  # for the job, and by the engine


def test_a_bundle_that_was_exchanged_makes_no_parts(images, predictor, tmp_path):
    parts = filling.Parts(tmp_path, "job", "another bundle", COUNT, 32, 5, 8)
    with pytest.raises(InputError, match="the bundle changed during the run"):
        next(filling.fill_parts(predictor, open_source(str(images)), parts, [0]))
    assert not list(tmp_path.iterdir())
