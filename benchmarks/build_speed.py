"""How fast a video becomes a memory, and that a longer one costs the same by the minute.

Claim: Big Buck Bunny (596 s, 720p) is built in at most 45 s on 2 cores with programs compiled
before, in less than 2 GB, and a video 8 times as long takes no more time for each minute.

    python benchmarks/build_speed.py VIDEO [--full]

The long video is VIDEO repeated (--times, 2 without --full). Each is built in a process of its own
after a few seconds of a made video. Keys: seconds, rtf (seconds of work for each second of video),
peak_rss_mb, stages (seconds; decode and segment run on a thread beside perceive and remember),
clips; long: the same of the long video; long_ratio: its rtf over the short one's; load is the
machine's, 1 minute, as it starts.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.long_video import repeat
from mmmem_jax.errors import UserError
from mmmem_jax.testing.videos import write_video
from mmmem_jax.video import build


def measure_one(video: Path, policy: str) -> dict:
    """Builds `video` in this process, warm."""
    with tempfile.TemporaryDirectory() as scratch:
        builder = build.make_builder(build.Settings(policy))
        warm = write_video(Path(scratch) / "warm.mp4", scenes=(2.0,) * 6, size=(320, 240))
        build.build(builder, str(warm), Path(scratch) / "memory")
        built = build.build(builder, str(video), Path(scratch) / "memory", name="measured")
    return {
        "seconds": round(built.seconds, 2),
        "rtf": round(built.seconds / built.seconds_of_video, 4),
        "video_seconds": round(built.seconds_of_video, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "stages": {name: round(seconds, 2) for name, seconds in built.stages.items()},
        "clips": built.counts.seen,
        "kept": built.counts.kept,
        "merged": built.counts.merged,
        "discarded": built.counts.discarded,
    }


def in_a_process(video: Path, policy: str) -> dict:
    """`measure_one` in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, str(video), "--only", "--policy", policy]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"the build of {video} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args) -> dict:
    """The keys of the result."""
    if not args.video.is_file():
        raise UserError(f"there is no video {args.video}; data/videos.py fetches some")
    load = os.getloadavg()[0]
    short = in_a_process(args.video, args.policy)
    times = args.times or (8 if args.full else 2)
    with tempfile.TemporaryDirectory() as scratch:
        long = in_a_process(repeat(args.video, Path(scratch) / "long.mp4", times), args.policy)
    return short | {
        "video": args.video.name,
        "policy": args.policy,
        "long": long,
        "long_ratio": round(long["rtf"] / short["rtf"], 3),
        "load": load,
        "seeds": [],  # nothing is drawn
    }


def main() -> None:
    """Parses the flags and reports."""
    parser = common.make_parser(__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("--times", type=int, help="repeats of the long video (8; 2 if not --full)")
    parser.add_argument("--policy", default="lite")
    parser.add_argument("--only", action="store_true", help="this video alone, and no record")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure_one(args.video, args.policy)))
    else:
        common.report("build_speed", args, lambda: measure(args))


if __name__ == "__main__":
    main()
