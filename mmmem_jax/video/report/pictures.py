"""Key frames made small, each on the page once."""

import base64
import io
from pathlib import Path

from PIL import Image

from mmmem_jax.store import ClipRecord

SIZE, MAX_BYTES = (160, 120), 8_000  # of one picture
MAX_FRAMES = 3  # of a clip


class Pictures:
    """The key frames that the page shows, each in it once; no more are made than `most`."""

    def __init__(self, most: int):
        self.shown: list[dict] = []  # id, width, height, time, data URI
        self.unreadable = 0
        self.most = most
        self._found: dict[tuple[int, int, int], dict | None] = {}

    def of(self, video: int, clip: ClipRecord, frame: int = 0) -> dict | None:
        """A key frame of a clip; None where there is none, or no room on the page."""
        key = (video, clip.index, frame)
        if key not in self._found and self.room:
            self._found[key] = self._make(*clip.frames[frame]) if len(clip.frames) > frame else None
        return self._found.get(key)

    def all(self, video: int, clip: ClipRecord) -> list[dict]:
        """The key frames of a clip that the page has."""
        found = (self.of(video, clip, frame) for frame in range(MAX_FRAMES))
        return [picture for picture in found if picture]

    @property
    def room(self) -> int:
        """How many more there may be."""
        return max(self.most - len(self.shown), 0)

    def _make(self, time: float, jpeg: bytes | Path) -> dict | None:
        small = small_jpeg(jpeg)
        if small is None:
            self.unreadable += 1
            return None
        data, width, height = small
        uri = "data:image/jpeg;base64," + base64.b64encode(data).decode()
        picture = {"id": f"f{len(self.shown)}", "width": width, "height": height, "uri": uri}
        self.shown.append(picture | {"time": float(time)})
        return self.shown[-1]


def small_jpeg(jpeg: bytes | Path) -> tuple[bytes, int, int] | None:
    """A JPEG file encoded anew, no larger than a thumbnail, with its size; None if unreadable."""
    source = jpeg if isinstance(jpeg, Path) else io.BytesIO(jpeg)
    try:
        with Image.open(source, formats=["JPEG"]) as file:
            file.draft("RGB", SIZE)  # decodes no more pixels than it must
            image = file.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    image.thumbnail(SIZE)
    for quality in (60, 35, 15):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality, optimize=True)
        if out.tell() <= MAX_BYTES:
            break
    return out.getvalue(), image.width, image.height
