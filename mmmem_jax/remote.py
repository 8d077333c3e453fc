"""Folders in a Google Cloud Storage bucket, where pathlib's are expected."""

import importlib.util
from pathlib import Path

from mmmem_jax.errors import UserError


def folder(name: str) -> Path:
    """The folder of that name: here, or gs://BUCKET/NAME as an `epath.Path`, which works alike.

    Raises:
      UserError: if it is in no bucket of gs://, or what gs:// needs is not installed.
    """
    scheme, found, _ = name.partition("://")
    if not found:
        return Path(name)
    if scheme != "gs":
        raise UserError(f"{name!r} is neither a folder nor in a bucket, gs://BUCKET/NAME")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name!r} needs gcsfs; install it by: pip install 'mmmem_jax[gcs]'")
    import fsspec.config
    from etils import epath

    # What other programs write there, eval_main --follow is to see.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(name)


def absolute(path: Path) -> Path:
    """The path from the root; of a bucket, as it is."""
    return path.resolve() if isinstance(path, Path) else path


def append(path: Path, line: str) -> None:
    """Adds a line to a text file; in a bucket, which cannot append, the file is written anew."""
    if isinstance(path, Path):
        with path.open("a") as file:
            file.write(line + "\n")
    else:
        path.write_text((path.read_text() if path.exists() else "") + line + "\n")
