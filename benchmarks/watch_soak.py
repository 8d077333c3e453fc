"""Watching for hours: memory and time per frame stay flat, and a kill loses no clip.

Claim: over hours of stream the resident memory and the time for each frame change by less than 5%,
frames are dropped only where the stream is faster than the machine, and are counted; every clip
that was reported is there after kill -9.

    python benchmarks/watch_soak.py VIDEO [--full]

VIDEO is repeated to --hours of stream (2; 0.1 without --full), played at --speed times real time
into --slots slots, so that the memory has long been full at the end. Keys: hours, speed, clips,
rss_growth and latency_growth (mean of the last quarter over that of the second, less 1), rss_mb,
ms_per_frame (median over clips, of the frames that were looked at), dropped; overload: the drops
and speed_reached (times real time) at 20 times that speed; clips_lost_after_kill of kills.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.long_video import repeat
from mmmem_jax import store
from mmmem_jax.errors import UserError
from mmmem_jax.perception import decode, lite
from mmmem_jax.video import build, watch

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


def growth(values: list[float]) -> float:
    """Mean of the last quarter over that of the second one, less 1: the first warms up."""
    quarter = len(values) // 4
    if not quarter:
        raise UserError("the stream is too short to tell growth; give more --hours")
    last, second = values[-quarter:], values[quarter : 2 * quarter]
    return statistics.fmean(last) / statistics.fmean(second) - 1


def soak(builder: build.Builder, video: Path, folder: Path, speed: float) -> dict:
    """Watches the whole of `video`."""
    resident, seconds, delays = [], [], []

    def note(done: watch.Remembered) -> None:
        resident.append(resident_mb())
        seconds.append(done.seconds_per_frame)
        delays.append(done.delay)

    started = time.perf_counter()
    watched = watch.watch(builder, str(video), folder, "soak", speed=speed, on_clip=note)
    return {
        "hours": round(watched.seconds_of_video / 3600, 3),
        "speed": speed,
        "clock_seconds": round(time.perf_counter() - started, 1),
        "clips": watched.counts.seen,
        "kept": watched.counts.kept,
        "forgotten": watched.counts.forgotten,
        "rss_growth": round(growth(resident), 4),
        "latency_growth": round(growth(seconds), 4),
        "rss_mb": round(resident[-1], 1),
        "ms_per_frame": round(1e3 * statistics.median(seconds), 2),
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
    builder = build.make_builder(build.Settings(args.policy, slots=args.slots))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "memory"
        long = repeat(args.video, Path(scratch) / f"long{args.video.suffix}", times)
        result = soak(builder, long, folder, args.speed)
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
