"""Small synthetic videos: a square moves over a plain ground, with hard cuts between scenes."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# Grounds of the scenes in turn; the square has the opposite colour.
COLOURS = ((200, 40, 40), (40, 160, 60), (40, 60, 200), (220, 210, 60), (120, 40, 160))


def scene_image(scene: int, step: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """The picture `step` frames into a scene; uint8 [H, W, 3]; `size` is (W, H), even numbers."""
    width, height = size
    ground = np.array(COLOURS[scene % len(COLOURS)], np.uint8)
    image = np.broadcast_to(ground, (height, width, 3)).copy()
    side = height // 4
    left = 2 * step % (width - side)
    image[height // 8 : height // 8 + side, left : left + side] = 255 - ground
    return image


def write_video(
    path: str | Path,
    *,
    scenes: Sequence[float] = (2.0, 2.0),
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    times: Sequence[float] | None = None,
    first_time: float = 0.0,
    turn: int = 0,
    aspect: Fraction | None = None,
    captions: Sequence[tuple[float, float, str]] = (),
    options: dict[str, str] | None = None,
) -> Path:
    """Writes a video and returns its path; the container is that of the path's suffix.

    Args:
      scenes: seconds each scene lasts.
      fps: frames a second.
      size: (width, height) as coded, in pixels, even numbers.
      codec: FFmpeg's name of the encoder.
      times: seconds of each frame instead of those of `fps`, rising, to the millisecond.
      first_time: seconds of the first frame.
      turn: degrees the picture is to be turned against the clock when shown (mp4, mov).
      aspect: width over height of a pixel.
      captions: (t0, t1, text) of an embedded track (mkv).
      options: of the encoder.
    """
    uneven = times is not None
    if not uneven:
        times = [i / fps for i in range(round(sum(scenes) * fps))]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        # Some formats know no times but those of whole frames.
        unit = Fraction(1, 1000 if uneven else fps)
        stream.codec_context.time_base = unit
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if turn:
            stream.set_display_rotation(turn)
        text = _caption_packets(container, captions) if captions else []
        starts = np.cumsum([0.0, *scenes])
        first = dict.fromkeys(range(len(scenes)))
        for time in times:
            scene = min(int(np.searchsorted(starts, time + 1e-6, "right")) - 1, len(scenes) - 1)
            first[scene] = time if first[scene] is None else first[scene]
            step = round((time - first[scene]) * fps)
            frame = av.VideoFrame.from_ndarray(scene_image(scene, step, size), "rgb24")
            frame.pts = round((time + first_time) / unit)
            frame.time_base = unit
            while text and text[0].pts * text[0].time_base <= time:
                container.mux(text.pop(0))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        container.mux(text)
    return Path(path)


def write_audio(path: str | Path, seconds: float = 1.0) -> Path:
    """Writes a file with a sound track and no pictures, and returns its path."""
    rate = 8000
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        tone = 8000 * np.sin(np.arange(int(seconds * rate)) * (2 * np.pi * 440 / rate))
        frame = av.AudioFrame.from_ndarray(tone.astype(np.int16)[None], "s16", "mono")
        frame.rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def srt(captions: Sequence[tuple[float, float, str]]) -> str:
    """The captions (t0, t1, text) as the text of a SubRip file."""

    def stamp(seconds: float) -> str:
        whole, milli = divmod(round(seconds * 1000), 1000)
        return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02},{milli:03}"

    rows = (f"{stamp(t0)} --> {stamp(t1)}\n{text}\n" for t0, t1, text in captions)
    return "\n".join(f"{n}\n{row}" for n, row in enumerate(rows, 1))


def _caption_packets(container, captions: Sequence[tuple[float, float, str]]) -> list[av.Packet]:
    """The captions as packets of a new track, which FFmpeg's SubRip reader makes."""
    file = io.BytesIO(srt(captions).encode())
    with av.open(file, format="srt") as source:
        track = container.add_stream_from_template(source.streams.subtitles[0])
        packets = [packet for packet in source.demux() if packet.size]
        for packet in packets:
            packet.stream = track
    return packets
