"""Watching for hours: memory and time per frame stay flat, and a kill loses no clip.

Claim: over hours of stream the resident memory and the time for each frame change by less than 5%,
frames are dropped only where the stream is faster than the machine, and are counted; every clip
that was reported is there after kill -9.

    python benchmarks/watch_soak.py VIDEO [--full]

VIDEO is repeated to --hours of stream (2; 0.1 without --full), played at --speed times real time
into --slots slots, so that the memory has long been full at the end; what is compiled is compiled
before, by watching VIDEO once. Keys: hours, speed, clips, rss_growth and latency_growth (median of
the last quarter over that of the second, less 1), rss_mb, dropped; overload: the drops and
speed_reached (times real time) at 20 times that speed; clips_lost_after_kill of kills.

After each clip the network looks at a fixed picture. latency_growth is of the time for each frame
over the time for that picture, in which whatever else a shared machine does cancels; by quarter,
ms_per_frame is the time for each frame as the clock shows it, ms_fixed that for the picture.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.long_video import repeat
from mmmem_jax import store
from mmmem_jax.errors import UserError
from mmmem_jax.models.conse import SeeFn
from mmmem_jax.perception import decode, lite
from mmmem_jax.video import build, watch

FIXED = 8  # times the picture is looked at after each clip
REPORT = """
import sys
from pathlib import Path
from mmmem_jax.video import build, watch

builder = build.make_builder(build.Settings(sys.argv[3], slots=64))
def tell(done):
    print(done.record.index, flush=True)
video, folder, _, speed = sys.argv[1:]
watch.watch(builder, video, Path(folder), "killed", speed=float(speed), on_clip=tell)
"""


def resident_mb() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def quarters(values: Sequence[float]) -> list[float]:
    """The median of each quarter of `values`.

    Raises:
      UserError: if there are too few values to tell.
    """
    if len(values) < 8:
        raise UserError("the stream is too short to tell growth; give more --hours")
    return [float(np.median(part)) for part in np.array_split(values, 4)]


def growth(values: Sequence[float]) -> float:
    """The last quarter over the second one, less 1: in the first the memory fills."""
    _, second, _, last = quarters(values)
    return round(last / second - 1, 4)


def soak(builder: build.Builder, see: SeeFn, video: Path, folder: Path, speed: float) -> dict:
    """Watches the whole of `video`; `see` is what the builder sees with."""
    resident, seconds, fixed, delays = [], [], [], []
    pictures = np.zeros((FIXED, 240, 320, 3), np.uint8)
    see(pictures)  # compiled

    def note(done: watch.Remembered) -> None:
        resident.append(resident_mb())
        seconds.append(done.seconds_per_frame)
        delays.append(done.delay)
        since = time.perf_counter()
        see(pictures)
        fixed.append((time.perf_counter() - since) / FIXED)

    started = time.perf_counter()
    watched = watch.watch(builder, str(video), folder, "soak", speed=speed, on_clip=note)
    return {
        "hours": round(watched.seconds_of_video / 3600, 3),
        "speed": speed,
        "clock_seconds": round(time.perf_counter() - started, 1),
        "clips": watched.counts.seen,
        "kept": watched.counts.kept,
        "forgotten": watched.counts.forgotten,
        "rss_growth": growth(resident),
        "latency_growth": growth(np.divide(seconds, fixed)),
        "rss_mb": round(resident[-1], 1),
        "ms_per_frame": [round(1e3 * part, 2) for part in quarters(seconds)],
        "ms_fixed": [round(1e3 * part, 2) for part in quarters(fixed)],
        "delay_p95": round(statistics.quantiles(delays, n=20)[-1], 3),
        "dropped": watched.frames_dropped,
    }


def overload(builder: build.Builder, video: Path, folder: Path, speed: float) -> dict:
    """What is dropped where the stream is much faster than the machine."""
    frames = decode.probe(str(video)).duration * lite.SENSORY_FPS
    resident = []
    started = time.perf_counter()
    watched = watch.watch(
        builder, str(video), folder, "overload", speed=speed,
        on_clip=lambda done: resident.append(resident_mb()),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return {
        "speed": speed,
        "speed_reached": round(watched.seconds_of_video / seconds, 1),
        "dropped": watched.frames_dropped,
        "dropped_share": round(watched.frames_dropped / frames, 3),
        "rss_mb": round(resident[-1], 1),
    }


def lost_after_kill(video: Path, folder: Path, policy: str, kills: int, speed: float) -> dict:
    """Kills a watching process again and again; counts reported clips that are not there."""
    lost, reported = 0, -1
    for kill in range(kills):
        command = [sys.executable, "-c", REPORT, str(video), str(folder), policy, str(speed)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for number, line in enumerate(process.stdout):
            reported = int(line)
            if number == 2 + kill:
                break
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.stdout.read().split())])
        process.stdout.close()
        process.wait()
        with store.open_store(folder, "killed") as kept:
            lost += max(reported + 1 - store.progress(kept).clips, 0)
    return {"kills": kills, "clips_reported": reported + 1, "clips_lost_after_kill": lost}


def measure(args) -> dict:
    """The keys of the result."""
    if not args.video.is_file():
        raise UserError(f"there is no video {args.video}; data/videos.py fetches some")
    duration = decode.probe(str(args.video)).duration
    hours = args.hours or (2.0 if args.full else 0.1)
    times = max(round(hours * 3600 / duration), 1)
    perception = lite.load_perception()
    builder = build.make_builder(build.Settings(args.policy, slots=args.slots), perception)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "memory"
        watch.watch(builder, str(args.video), folder, "warm", speed=args.speed)
        long = repeat(args.video, Path(scratch) / f"long{args.video.suffix}", times)
        result = soak(builder, perception.see, long, folder, args.speed)
        fast = repeat(args.video, Path(scratch) / f"fast{args.video.suffix}", max(times // 10, 1))
        result["overload"] = overload(builder, fast, folder, 20 * args.speed)
        result |= lost_after_kill(fast, folder, args.policy, 3, args.speed)
    # Nothing is drawn.
    return result | {
        "video": args.video.name, "policy": args.policy, "slots": args.slots, "seeds": []
    }  # fmt: skip


def main() -> None:
    """Parses the flags and reports."""
    parser = common.make_parser(__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("--hours", type=float, help="of stream (2; 0.1 if not --full)")
    parser.add_argument("--speed", type=float, default=10.0, help="times real time (default: 10)")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--policy", default="lite")
    args = parser.parse_args()
    common.report("watch_soak", args, lambda: measure(args))


if __name__ == "__main__":
    main()
