"""mmmem: a memory of videos, and answers from it.

    mmmem build holiday.mp4 --memory memories/        # watch a file once, remember it
    mmmem ask   --memory memories/ "where did I leave the bike?"
    mmmem report --memory memories/                    # an HTML page of what is remembered
    mmmem watch rtsp://camera/ --memory memories/      # remember a live stream

Everything runs on this machine; the weights (about 100 MB) are fetched once.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmmem_jax.errors import UserError

DEFAULT_SLOTS = 512
BACKBONES = ("lite", "qwen3_vl")
_MODEL_FLAGS = ("checkpoint", "adapter", "text_encoder", "context")  # of qwen3_vl


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def parse_time(text: str) -> float:
    """Seconds of '90', '1:30' or '01:00:01.5'.

    Raises:
      argparse.ArgumentTypeError: if it is none of these.
    """
    parts = text.split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    whole = all(x.is_integer() for x in numbers[:-1])
    rest = all(0 <= x < 60 for x in numbers[1:])
    if not 1 <= len(numbers) <= 3 or not whole or not rest or not 0 <= numbers[0] < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90, 1:30 or 1:02:03")
    seconds = 0.0
    for number in numbers:
        seconds = seconds * 60 + number
    return seconds


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _slots(text: str) -> int:
    value = int(text)
    if not 8 <= value <= 65536:
        raise argparse.ArgumentTypeError(f"{text} is not between 8 and 65536")
    return value


def _tokens(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The parser of all four commands; `args.run(args)` runs the chosen one."""
    parser = _Parser(
        prog="mmmem", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_build, _add_ask, _add_watch, _add_report):
        add(commands)
    return parser


def _command(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--memory", type=Path, required=True, metavar="DIR", help="folder of the memories"
    )
    return parser


def _memory_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone",
        choices=BACKBONES,
        default="lite",
        help="what looks at the video: small networks (lite, the default), or the paper's model",
    )
    _model_flags(parser)
    parser.add_argument(
        "--policy",
        help="who decides what is kept: the backbone's own manager (the default), a fixed rule such"
        " as keep_recent, or with lite the workdir of a run of configs/lite.py",
    )
    parser.add_argument(
        "--slots",
        type=_slots,
        default=DEFAULT_SLOTS,
        help=f"clips and episodes the memory may hold (default: {DEFAULT_SLOTS})",
    )
    parser.add_argument(
        "--name", help="name of the video in the memory (default: from the file's name)"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="forget what is remembered of the video, and start anew",
    )


def _model_flags(parser) -> None:
    """The models of backbone qwen3_vl; `parser` may be a group of one."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="the Qwen3-VL of backbone qwen3_vl: a folder, or a repo id such as"
        " Qwen/Qwen3-VL-8B-Instruct",
    )
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA for it, as PEFT saves them")
    parser.add_argument(
        "--text-encoder",
        metavar="DIR",
        help="the BERT that embeds a memory's texts, such as BAAI/bge-large-en-v1.5 (default:"
        " all-MiniLM-L6-v2)",
    )
    parser.add_argument(
        "--context",
        type=_tokens,
        metavar="TOKENS",
        help="that it may read (default: 8192, or all that the model knows)",
    )


def _add_build(commands) -> None:
    parser = _command(
        commands, "build", _build, "watch video files once and remember them; resumes where stopped"
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="any file FFmpeg reads")
    _memory_flags(parser)
    parser.add_argument(
        "--subtitles",
        type=Path,
        metavar="FILE",
        help=".srt or .vtt (default: one beside the video, else the video's own)",
    )


def _add_ask(commands) -> None:
    parser = _command(commands, "ask", _ask, "answer a question from the memory, with its evidence")
    parser.add_argument("question")
    parser.add_argument(
        "--options", nargs="+", default=(), metavar="OPTION", help="choose among these answers"
    )
    parser.add_argument(
        "--at", type=parse_time, metavar="TIME", help="answer as of this time (90, 1:30, 1:02:03)"
    )
    parser.add_argument(
        "--video", action="append", metavar="NAME", help="ask of this video alone (repeatable)"
    )
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    parser.add_argument(
        "--lm",
        action="store_true",
        help="let a small language model (SmolLM2-135M, 93 MB) word the answer",
    )
    model = parser.add_argument_group("memories of --backbone qwen3_vl")
    model.add_argument(
        "--backbone",
        choices=BACKBONES,
        help="what the memory was made with (default: what it says of itself)",
    )
    _model_flags(model)
    model.add_argument(
        "--reranker", metavar="DIR", help="cross-encoder that ranks entities (default: none)"
    )
    model.add_argument(
        "--mode",
        choices=("likelihood", "generate"),
        help="choose the option with the likeliest letter (default), or the letter that is written",
    )


def _add_watch(commands) -> None:
    parser = _command(
        commands, "watch", _watch, "remember a live stream while it plays; Ctrl-C ends it"
    )
    parser.add_argument(
        "source", help="a file (played in real time), a camera (/dev/video0), an RTSP or HTTP URL"
    )
    _memory_flags(parser)
    parser.add_argument(
        "--speed", type=_positive, default=1.0, help="speed at which a file is played (default: 1)"
    )


def _add_report(commands) -> None:
    parser = _command(commands, "report", _report, "write an HTML page of what is remembered")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to (default: report.html in the memory)"
    )


def _settings(args: argparse.Namespace):
    """build.Settings of the flags; those of another backbone are refused."""
    from mmmem_jax.video.build import Settings

    given = {name: x for name in _MODEL_FLAGS if (x := getattr(args, name)) is not None}
    if args.backbone == "lite" and given:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise UserError(f"{flag} is of --backbone=qwen3_vl; add that, or leave {flag} out")
    if args.backbone == "qwen3_vl" and not args.checkpoint:
        raise UserError("--backbone=qwen3_vl needs --checkpoint; give a Qwen3-VL's folder")
    policy = args.policy or args.backbone
    return Settings(policy=policy, slots=args.slots, backbone=args.backbone, **given)


@contextlib.contextmanager
def _out_of_memory_told() -> Iterator[None]:
    """Says in one line what to lower where the device or the host has no room."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "no memory is left; lower --context, take a smaller --checkpoint, or free some"
        ) from error


def _build(args: argparse.Namespace) -> None:
    from mmmem_jax.video import build

    if args.name and len(args.videos) > 1:
        raise UserError("--name is of one video; build them one by one to name them")
    if args.subtitles and len(args.videos) > 1:
        raise UserError("--subtitles is of one video; build them one by one to give each its own")
    _use_compilation_cache()
    settings = _settings(args)
    build.check(args.videos)
    with _out_of_memory_told():
        builder = build.make_builder(settings)
        for video in args.videos:
            built = build.build(
                builder, video, args.memory, name=args.name, subtitle_file=args.subtitles,
                again=args.again,
            )  # fmt: skip
            print(build.told(built))


def _ask(args: argparse.Namespace) -> None:
    from mmmem_jax.video import ask

    backbone = args.backbone or ask.backbone_of(args.memory, args.video)
    _check_backbone(args, backbone)
    _use_compilation_cache()
    with _out_of_memory_told():
        answer = _ask_lite(args) if backbone == "lite" else _ask_qwen3_vl(args)
    print(json.dumps(ask.as_json(answer), indent=1) if args.json else ask.told(answer))


def _check_backbone(args: argparse.Namespace, backbone: str) -> None:
    """Raises UserError for flags of the other backbone, and for a checkpoint that is not given."""
    if backbone not in BACKBONES:
        raise UserError(f"{args.memory} was made with {backbone!r}, which this version cannot ask")
    if backbone == "qwen3_vl":
        if args.checkpoint is None:
            raise UserError(
                f"{args.memory} is asked with qwen3_vl: give --checkpoint DIR, the model's folder"
            )
        if args.lm:
            raise UserError("--lm is for lite memories; qwen3_vl words its answers itself")
        return
    for flag in (*_MODEL_FLAGS, "reranker", "mode"):
        if getattr(args, flag) is not None:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} is for qwen3_vl; {args.memory} is asked with lite")


def _ask_lite(args: argparse.Namespace):
    from mmmem_jax.video import ask

    word_fn = None
    if args.lm:
        from mmmem_jax.video.wording import load_word_fn

        word_fn = load_word_fn()
    return ask.ask(
        args.memory, args.question, options=args.options, at=args.at, videos=args.video,
        word_fn=word_fn,
    )  # fmt: skip


def _ask_qwen3_vl(args: argparse.Namespace):
    from mmmem_jax.video import qwen3_vl_ask as ask

    def load():
        return ask.load_thinker(
            args.checkpoint, adapter=args.adapter, text_encoder=args.text_encoder,
            reranker=args.reranker, context=args.context,
        )  # fmt: skip

    return ask.ask(
        args.memory, args.question, load, options=args.options, at=args.at, videos=args.video,
        config=ask.AnswerConfig(mode=args.mode or "likelihood"),
    )  # fmt: skip


def _watch(args: argparse.Namespace) -> None:
    from mmmem_jax.video import build, watch

    _use_compilation_cache()
    settings = _settings(args)
    with _out_of_memory_told():
        builder = build.make_builder(settings)
        watched = watch.watch(
            builder, args.source, args.memory, args.name, speed=args.speed, again=args.again
        )
    print(watch.told(watched))


def _report(args: argparse.Namespace) -> None:
    from mmmem_jax.video import report

    out = args.out or args.memory / "report.html"
    if not out.name or (out.exists() and not out.is_file()):  # a device is not to be replaced
        raise UserError(f"--out {out} is no file; name one, such as report.html")
    print(report.write_report(args.memory, out))


def _use_compilation_cache() -> None:
    """Keeps compiled programs beside the weights, so that only the first start compiles."""
    from mmmem_jax.models.weights import default_cache_dir

    # Where it cannot be read or written, programs are compiled each time, which harms nobody.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    folder = default_cache_dir() / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _one_line(text: str) -> str:
    """`text` with nothing in it that could start a line or steer a terminal."""
    plain = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in plain)


class _OneLine(logging.Formatter):
    """A warning as the command line tells all things."""

    def format(self, record: logging.LogRecord) -> str:
        return f"mmmem: {_one_line(record.getMessage())}"


def _tell(text: str) -> None:
    print("mmmem:", _one_line(text), file=sys.stderr)


def _flush() -> None:
    """Writes what was printed now: what goes wrong as Python ends, nobody can catch."""
    if sys.stdout is None:  # closed by who started us
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a mistake is one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal has every letter
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        try:
            args = make_parser().parse_args(argv)
            args.run(args)
        finally:
            _flush()
    except UserError as error:
        _tell(str(error))
        return 2
    except BrokenPipeError:  # the reader of our output left, as `head` does
        return 1
    except KeyboardInterrupt:
        _tell("interrupted; the same command goes on from there")
        return 130
    except OSError as error:  # of this machine, not of ours: a file that is gone, a full output
        _tell(f"{error.filename or 'output'}: {error.strerror or error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
