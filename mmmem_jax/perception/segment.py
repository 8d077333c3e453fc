"""A stream of frames and captions cut into clips: at scene changes, and where they get long.

Scene changes are PySceneDetect's (`ContentDetector`, the mean change of hue, saturation and
luminance), with the threshold of MM-Mem's released settings (20-27).
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from scenedetect import ContentDetector, FrameTimecode

from mmmem_jax.perception.decode import Frame, is_held
from mmmem_jax.perception.subtitles import Cue, overlapping

_MIN_SECONDS = 1.0  # a scene that is shorter stays with what follows it
_LONGEST_HELD = 3600.0  # seconds; what is silent for longer was off
_STEP = 2  # every second pixel each way is enough to see a cut
_EPSILON = 1e-6  # seconds: rounding of times


class Clip(NamedTuple):
    """Frames of one scene: span [t0, t1) in seconds; the cues that overlap it."""

    index: int
    span: tuple[float, float]
    frames: tuple[Frame, ...]
    cues: tuple[Cue, ...]


def clips(
    stream: Iterable[Frame | Cue],
    cues: Iterable[Cue] = (),
    *,
    max_seconds: float = 10.0,
    threshold: float = 27.0,
    fps: float = 5.0,
    first_index: int = 0,
    first_end: float | None = None,
) -> Iterator[Clip]:
    """Cuts `stream` into clips, each yielded once the first frame after it is seen.

    A clip ends at a scene change, unless it is under one second long, or after `max_seconds`. A
    picture stays on screen until the next one comes: where that is long after `max_seconds` (see
    `decode.is_held`), the picture begins the next clip, with the time of its start; where it is
    soon, the clip lasts until then. So clips tile the stream; only where no picture comes for over
    an hour they leave a hole. The last one ends 1/fps after its last frame. A clip depends on
    nothing before it: `decode.read` from a clip's end on gives the same clips as a whole pass.

    Args:
      stream: frames by rising time, captions among them, as from `decode.read`.
      cues: more captions, as from `read_subtitles`. A cue goes with every clip that it overlaps;
        in a hole and after the last frame, with the clip before.
      threshold: change of a frame, in levels of 255, that is a scene change.
      fps: the frame rate `stream` was read with.
      first_index: of the first clip.
      first_end: where the first clip ends, in seconds, if that is known of an earlier pass: there,
        whatever its pictures show. If no frame is left before it, the clip is not yielded again.
    """
    later = deque(sorted(cues))
    shown: list[Cue] = []
    frames: list[Frame] = []

    def finish(end: float, until: float) -> Clip:
        """The clip, with the cues before `until`."""
        nonlocal shown
        start = frames[0].time
        while later and later[0].t0 < until:
            shown.append(later.popleft())
        shown = sorted(cue for cue in shown if cue.t1 > start)
        return Clip(index, (start, end), tuple(frames), overlapping(shown, (start, until)))

    index = first_index
    detector = _detector(threshold)
    for item in stream:
        if isinstance(item, Cue):
            shown.append(item)
            continue
        end = frames[0].time + max_seconds if frames else -math.inf
        end = end if first_end is None else first_end
        while frames and is_held(end, item.time, fps) and item.time - end <= _LONGEST_HELD:
            yield finish(end, end)
            index, first_end = index + 1, None
            frames = [Frame(end, frames[-1].image)]
            detector = _detector(threshold)
            _is_cut(detector, frames[0], fps)
            end += max_seconds
        cut = first_end is None and _is_cut(detector, item, fps)
        if item.time >= end - _EPSILON or (
            cut and item.time - frames[0].time >= _MIN_SECONDS - _EPSILON
        ):
            if frames:
                exact = first_end is not None or is_held(end, item.time, fps)
                yield finish(end if exact else item.time, item.time)
            index += bool(frames) or first_end is not None
            frames, first_end = [], None
            detector = _detector(threshold)
            _is_cut(detector, item, fps)
        frames.append(item)
    if frames:
        yield finish(frames[-1].time + 1 / fps if first_end is None else first_end, math.inf)


def _detector(threshold: float) -> ContentDetector:
    return ContentDetector(threshold=threshold, min_scene_len=0)


def _is_cut(detector: ContentDetector, frame: Frame, fps: float) -> bool:
    """Whether the scene changes with `frame`, the next one the detector is shown."""
    bgr = np.ascontiguousarray(frame.image[::_STEP, ::_STEP, ::-1])
    return bool(detector.process_frame(FrameTimecode(frame.time, fps), bgr))
