"""Video in: one sequential pass over any file or stream FFmpeg reads, as upright RGB frames.

Each frame is predicted from others, so all are decoded, but for those that no other one needs and
that are not sampled. Only sampled frames are scaled and made RGB.
"""

import contextlib
import logging
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from mmmem_jax.errors import UserError
from mmmem_jax.perception.subtitles import Cue, plain_text

_MAX_PIXELS = 8192 * 8192
_MAX_ASPECT = 8  # of what comes out; narrower and wider pictures are squeezed
_LONGEST = 1e7  # seconds, some 16 weeks; a longer duration is a mistake of the file's
_LONGEST_GAP = 86400.0  # seconds between two frames; a later frame has a wrong time
_PATIENCE = 25  # frames in a row with wrong times, after which the clock is set anew
_HELD = 1.0  # seconds without a new picture, after which the old one is shown again
_EPSILON = 1e-6  # seconds, far under any frame's length: rounding of times
# Codecs whose non-reference pictures FFmpeg can leave out with no effect on any other. (In HEVC,
# pictures of a higher temporal layer may need them.)
_SKIPPABLE = frozenset({"h264", "mpeg2video", "mpeg4"})
# Demuxers that draw text, or that read other files than the one they are given.
_NO_VIDEO = frozenset({"concat", "dash", "hls", "image2", "sdp", "tty"})
_NO_OPTIONS: Mapping[str, str] = MappingProxyType({})

_SECRET = re.compile(r"(?<=://)\S*@|\?\S*")  # user and password of a URL, and its query

_log = logging.getLogger(__name__)


class VideoInfo(NamedTuple):
    """What a video says of itself: seconds, pixels as displayed, frames a second on average."""

    duration: float | None
    width: int
    height: int
    fps: float | None


class Frame(NamedTuple):
    """One picture: seconds since the start of the stream; uint8 [H, W, 3], RGB, upright."""

    time: float
    image: np.ndarray


def probe(source: str | Path) -> VideoInfo:
    """Reads the header of `source` and decodes its first picture.

    Raises:
      UserError: as `read`.
    """
    source = str(source)
    with _open(source) as container:
        stream = _video_stream(container, source)
        size = _square_size(stream)
        damage = _Damage()
        needed = ((packet, True) for packet in _demuxed(container, [stream], damage))
        frame = next(_decoded(needed, stream, damage), None)
        if frame is None:
            raise _nothing_decoded(source)
        rate = _rate(stream)
        return VideoInfo(_duration(container, stream), *_displayed_size(size, frame), rate)


def read(
    source: str | Path,
    *,
    fps: float = 5.0,
    short_side: int = 256,
    start: float = 0.0,
    format: str | None = None,
    options: Mapping[str, str] = _NO_OPTIONS,
) -> Iterator[Frame | Cue]:
    """Yields the frames of `source` in the order of their times, and its embedded captions.

    Time is cut into ticks of 1/fps seconds; of each tick the first frame that begins in it is
    yielded, none where none does. Captions are those of the first text track; each comes before the
    frames that follow its packet. (If `start` is over 0, those still shown then come first of all.)

    Args:
      source: a path, or a URL.
      fps: frames a second at most.
      short_side: pixels of the shorter side of the yielded images.
      start: seconds; what is earlier is left out. The frames are those of an uninterrupted read;
        but where none comes for long (see `is_held`), the one on screen comes first, at `start`.
      format: FFmpeg's name of the input format, such as "v4l2" for a camera; None finds it out.
      options: FFmpeg's options of the input format and its protocol.

    Raises:
      UserError: there is no such file, or it is no video that can be decoded. Where only a part is
        damaged, what is whole is yielded, and one warning logged at the end.
    """
    source = str(source)
    if start > 0:
        yield from _cues_before(source, start, format, options)
    with _open_at(source, _tick(start, fps) / fps, format, options) as container:
        stream = _video_stream(container, source)
        streams = [stream, *_text_streams(container)]
        size = _square_size(stream)
        clock = _Clock(stream)
        damage = _Damage()
        packets = _with_need(_demuxed(container, streams, damage), stream, clock, fps)
        reformatter = VideoReformatter()
        shape = time = seen = None
        for item in _decoded(packets, stream, damage):
            if isinstance(item, av.Packet):
                yield from (cue for cue in _cues(item, clock) if cue.t0 >= start)
                continue
            time, last = clock.next(item), time
            if time is None:
                time = last
                damage.misplaced += 1
            elif _tick(time, fps) != seen:
                before, seen = seen, _tick(time, fps)
                if time >= start - _EPSILON:
                    if shape is None:
                        shape = _scaled_size(_displayed_size(size, item), short_side)
                        if before is not None and is_held(start, time, fps):
                            earlier = read(
                                source, fps=fps, short_side=short_side, start=before / fps,
                                format=format, options=options,
                            )  # fmt: skip
                            yield from _first_shown(earlier, start)
                    yield Frame(time, _upright(item, shape, reformatter))
        if time is None:
            raise _nothing_decoded(source)
        # Some formats count the duration from zero, not from the first frame.
        first = float((stream.start_time or 0) * stream.time_base)
        damage.warn(source, time, (_duration(container, stream) or 0.0) - max(0.0, first))


def is_held(time: float, until: float, fps: float) -> bool:
    """Whether to show a picture again at `time`, in seconds, if the next one comes at `until`.

    That is so from one second on, and from two ticks on.
    """
    return until - time >= max(_HELD, 2 / fps)


def _first_shown(stream: Iterator[Frame | Cue], time: float) -> Iterator[Frame]:
    """The first frame of `stream`, if it is earlier than `time`, as one of that time."""
    with contextlib.closing(stream):
        frame = next((item for item in stream if isinstance(item, Frame)), None)
    if frame is not None and frame.time < time:
        yield frame._replace(time=time)


class _Damage:
    """What of a video could not be used."""

    def __init__(self):
        self.packets = 0  # do not decode
        self.misplaced = 0  # frames at impossible times
        self.stopped = ""  # why reading ended before the end

    def warn(self, source: str, end: float, duration: float) -> None:
        """Logs one warning, if anything was lost; the last frame was at `end` seconds."""
        told = []
        if self.packets:
            told.append(f"{self.packets} damaged packets or pictures were skipped")
        if self.misplaced:
            told.append(f"{self.misplaced} frames with impossible times were skipped")
        if self.stopped:
            told.append(f"reading stopped at {end:.1f} s ({self.stopped})")
        elif end < duration - max(2.0, 0.02 * duration):
            told.append(f"its pictures end at {end:.1f} s of {duration:.1f} s; is it cut short?")
        if told:
            _log.warning("%s: %s", shown(source), "; ".join(told))


class _Clock:
    """Seconds since the start of a stream, from timestamps or, where there are none, counted."""

    def __init__(self, stream: av.VideoStream):
        self._origin = stream.start_time and stream.start_time * stream.time_base
        self._step = 1 / (_rate(stream) or 25.0)
        self._last: float | None = None
        self.refused = 0  # frames in a row

    def of(self, timed: av.Packet | av.VideoFrame) -> float | None:
        """Seconds; None if there is no timestamp."""
        stamp = _stamp(timed)
        if stamp is None:
            return None
        if self._origin is None:
            self._origin = stamp
        return max(0.0, float(stamp - self._origin))

    def next(self, frame: av.VideoFrame) -> float | None:
        """Seconds; None if that is not after the frame before, or days after it.

        If it goes on so, the timestamps have jumped: from then on all are told from there.
        """
        time = self.of(frame)
        if self._last is None:
            self._last = time or 0.0
            return self._last
        if time is None:
            time = self._last + self._step
        if not self._last < time < self._last + _LONGEST_GAP:
            self.refused += 1
            if self.refused <= _PATIENCE:
                return None
            time = self._last + self._step
            self._origin = _stamp(frame) - Fraction(time)
        self._last, self.refused = time, 0
        return time


def _stamp(timed: av.Packet | av.VideoFrame):
    """When to show it, in seconds as a fraction; some formats only tell when to decode it."""
    stamp = timed.dts if timed.pts is None else timed.pts
    return None if stamp is None or timed.time_base is None else stamp * timed.time_base


def _tick(time: float, fps: float) -> int:
    return math.floor(time * fps + _EPSILON)


def shown(source: str) -> str:
    """A source as it may be printed: a URL without its password and query."""
    return _SECRET.sub("", source) if "://" in source else source


def _open(
    source: str, format: str | None = None, options: Mapping[str, str] = _NO_OPTIONS
) -> av.container.InputContainer:
    options = {"max_pixels": str(_MAX_PIXELS), **options}
    local = format is None and "://" not in source
    if local:
        _check_file(source)
        # A file that names others, as a playlist does, may not make us fetch them.
        options["protocol_whitelist"] = "file"
    location = f"file:{source}" if local else source
    try:
        container = av.open(location, format=format, options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{shown(source)} cannot be read as a video: {_reason(error)}") from error
    if local and _NO_VIDEO & set(container.format.name.split(",")):
        container.close()
        raise UserError(f"{source} is no video: FFmpeg takes it for {container.format.long_name}")
    return container


def _check_file(source: str) -> None:
    try:
        found = os.stat(source)
        if stat.S_ISFIFO(found.st_mode):  # to open it would wait for its other end
            raise UserError(f"{source} is a pipe, no file; write the video to a file first")
        open(source, "rb").close()
    except OSError as error:
        raise UserError(f"cannot open the video {source}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{source!r} is no path of a video: {error}") from error
    if not found.st_size:
        raise UserError(f"{source} is empty (0 bytes); fetch or record it again")


def _open_at(
    source: str, target: float, format: str | None, options: Mapping[str, str]
) -> av.container.InputContainer:
    """Opens `source`, at a key frame at or before `target` seconds if there is a way to."""
    container = _open(source, format, options)
    if target > 0:
        stream = _video_stream(container, source)
        if _jumps(container, stream) or not _seek(container, stream, target):
            container.close()  # it may stand anywhere now
            container = _open(source, format, options)
    return container


def _jumps(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether timestamps fall back or leap, so that one may be there twice; reads to the end.

    Only of formats that are made to be cut and joined, such as MPEG-TS.
    """
    if not container.format.flags & av.format.Flags.ts_discont.value:
        return False
    last = None
    for packet in _demuxed(container, [stream], _Damage()):
        if packet.dts is not None:
            time = packet.dts * packet.time_base
            if last is not None and not last <= time < last + _LONGEST_GAP:
                return True
            last = time
    return False


def _seek(container: av.container.InputContainer, stream: av.VideoStream, target: float) -> bool:
    """Whether the next packet is a key frame to be shown at or before `target` seconds.

    Files are indexed by decoding time, or not at all, so what a seek finds is looked at. Without
    a time to show it at, nobody can tell what comes before a key frame.
    """
    if stream.start_time is None or stream.time_base is None:
        return False
    for margin in (0.0, 1.0, 4.0, 16.0, 64.0):
        offset = stream.start_time + math.floor((target - margin) / stream.time_base)
        try:
            container.seek(offset, stream=stream)
            packet = next(container.demux(stream))
            if packet.pts is None:
                return False
            if packet.is_keyframe and _Clock(stream).of(packet) <= target + _EPSILON:
                container.seek(offset, stream=stream)
                return True
        except (av.FFmpegError, StopIteration, OverflowError):
            return False
        if target <= margin:
            return False
    return False


def _video_stream(container: av.container.InputContainer, source: str) -> av.VideoStream:
    """The first track of moving pictures, set up for decoding."""
    name = shown(source)
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
        has = f"only {' and '.join(kinds)}" if kinds else "nothing"
        raise UserError(f"{name} has no video track ({has}); give a file with pictures")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise UserError(f"{name}: FFmpeg has no decoder for its video; convert it, say to H.264")
    if context.width * context.height > _MAX_PIXELS:
        size = f"{context.width}x{context.height}"
        raise UserError(f"{name}: {size} pixels are more than 8192x8192; scale it down first")
    context.options = {"max_pixels": str(_MAX_PIXELS)}  # it may grow on the way
    context.thread_type = "AUTO"
    context.thread_count = min(8, os.cpu_count() or 1)
    return stream


def _text_streams(container: av.container.InputContainer) -> list[av.stream.Stream]:
    """The first track of captions that are text, if there is one."""
    tracks = (s for s in container.streams.subtitles if s.codec_context is not None)
    return [s for s in tracks if s.codec_context.codec.text_sub][:1]


def _demuxed(
    container: av.container.InputContainer, streams: list, damage: _Damage
) -> Iterator[av.Packet]:
    """The packets of `streams`, and an empty one of each at the end, which flushes its decoder."""
    try:
        yield from container.demux(streams)
    except IndexError:
        # PyAV (18.1) trips over streams that only appeared on the way, which it flushes last.
        pass
    except av.FFmpegError as error:
        damage.stopped = _reason(error)
        flush = av.Packet()
        flush.stream = streams[0]
        yield flush


def _with_need(
    packets: Iterable[av.Packet], stream: av.VideoStream, clock: _Clock, fps: float
) -> Iterator[tuple[av.Packet, bool]]:
    """Pairs each packet with whether `read` may yield its frame: is any before it in its tick?"""
    first: dict[int, float] = {}
    for packet in packets:
        if packet.stream is not stream or packet.pts is None:
            yield packet, True
            continue
        time = clock.of(packet)
        tick = _tick(time, fps)
        first[tick] = min(first.get(tick, time), time)
        if len(first) > 64:  # far more than are reordered
            del first[min(first)]
        # While frames are refused, nobody knows their ticks.
        yield packet, bool(clock.refused) or time <= first.get(tick, time)


def _decoded(
    packets: Iterable[tuple[av.Packet, bool]], stream: av.VideoStream, damage: _Damage
) -> Iterator[av.VideoFrame | av.Packet]:
    """Frames of `stream` in the order they are shown, and the packets of other streams as such."""
    context = stream.codec_context
    skippable = context.name in _SKIPPABLE
    skipping = False
    for packet, needed in packets:
        if packet.stream is not stream:
            yield packet
            continue
        if skippable and skipping == needed:
            skipping = not needed
            context.skip_frame = "NONREF" if skipping else "DEFAULT"
        try:
            frames = packet.decode()
        except av.FFmpegError:
            damage.packets += 1
            continue
        for frame in frames:
            if frame.is_corrupt:
                damage.packets += 1
            else:
                yield frame


def _cues(packet: av.Packet, clock: _Clock) -> Iterator[Cue]:
    t0 = clock.of(packet)
    if t0 is None or not packet.duration:
        return
    try:
        captions = packet.decode()
    except av.FFmpegError:
        return
    text = plain_text(" ".join(c.dialogue.decode(errors="replace") for c in captions))
    if text:
        t1 = round(t0 + float(packet.duration * packet.time_base), 6)
        yield Cue(t0, t1, text)


def _cues_before(
    source: str, start: float, format: str | None, options: Mapping[str, str]
) -> Iterator[Cue]:
    """Embedded captions that began before `start` seconds and are still shown then."""
    with _open(source, format, options) as container:
        clock = _Clock(_video_stream(container, source))
        for text in _text_streams(container):
            for packet in _demuxed(container, [text], _Damage()):
                time = clock.of(packet)
                if time is not None and time >= start:
                    break
                yield from (cue for cue in _cues(packet, clock) if cue.t1 > start)


def _square_size(stream: av.VideoStream) -> tuple[int, int]:
    """(width, height) the header tells, of square pixels; the decoder may change it on its way."""
    width, height = stream.codec_context.width, stream.codec_context.height
    aspect = stream.sample_aspect_ratio
    if aspect and 1 / _MAX_ASPECT < aspect < _MAX_ASPECT:
        width = round(width * aspect)
    return width, height


def _displayed_size(square: tuple[int, int], frame: av.VideoFrame) -> tuple[int, int]:
    """(width, height) of the upright picture; `square` has zeros where no header told it."""
    width, height = square if all(square) else (frame.width, frame.height)
    return (height, width) if _quarter_turns(frame) % 2 else (width, height)


def _scaled_size(displayed: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(displayed)
    width, height = (min(round(side * scale), short_side * _MAX_ASPECT) for side in displayed)
    return width, height


def _quarter_turns(frame: av.VideoFrame) -> int:
    """How often to turn the frame by 90 degrees against the clock."""
    return round(frame.rotation / 90) % 4


def _upright(
    frame: av.VideoFrame, shape: tuple[int, int], reformatter: VideoReformatter
) -> np.ndarray:
    """uint8 [H, W, 3], RGB; `shape` is (W, H)."""
    turns = _quarter_turns(frame)
    width, height = shape[::-1] if turns % 2 else shape
    scaled = reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA")
    return np.ascontiguousarray(np.rot90(scaled.to_ndarray(), turns))


def _rate(stream: av.VideoStream) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate and 0 < rate <= 1000 else None


def _duration(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        duration = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        duration = container.duration / av.time_base
    else:
        return None
    return duration if 0 < duration <= _LONGEST else None


def _nothing_decoded(source: str) -> UserError:
    return UserError(
        f"{shown(source)} has no picture that can be decoded: it is damaged, cut short, or its"
        " pictures are larger than 8192x8192"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
