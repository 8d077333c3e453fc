"""The page as text. Any text in it may be hostile: the template escapes all of it."""

import base64
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from mmmem_jax import store
from mmmem_jax.store.layout import write_whole
from mmmem_jax.video.report.pictures import MAX_FRAMES, Pictures
from mmmem_jax.video.report.pyramid import choose, draw_video
from mmmem_jax.video.report.questions import draw_question
from mmmem_jax.video.report.text import clock, during, sample
from mmmem_jax.video.report.views import VideoView, read_video

MAX_PAGE_BYTES = 5_000_000
MAX_VIDEOS, MAX_QUESTIONS, MAX_PICTURES = 40, 40, 200


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmmem_jax.video.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"clock": clock, "during": during}
    return environment.get_template("page.html.jinja")


@functools.cache
def _inline(name: str) -> tuple[str, str]:
    """A style sheet or script of this folder, and its hash for the content security policy."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return text, f"'sha256-{digest}'"


def page(videos: Sequence[VideoView], questions: Sequence[Mapping] = ()) -> str:
    """The report as the text of one HTML file of at most MAX_PAGE_BYTES.

    Args:
      videos: what is shown of each video, in the page's order.
      questions: rows of questions.jsonl, oldest first; any key may be missing.
    """
    for part in (1, 2, 4, 8, 16, 32):  # of what may be drawn: one, unless texts are very long
        text = _render(videos, questions, part)
        if len(text.encode()) <= MAX_PAGE_BYTES:
            break
    return text


def _render(videos: Sequence[VideoView], questions: Sequence[Mapping], part: int) -> str:
    """The page with 1 / part of the items, questions and pictures that it may have."""
    shown = videos[:MAX_VIDEOS]
    pictures = Pictures(MAX_PICTURES // part // 2)
    chosen = choose(shown, part)
    # Key frames that answers rest on may take half of the room, an even choice of all the rest.
    newest = questions[: -MAX_QUESTIONS // part - 1 : -1]
    asked = [draw_question(row, chosen, pictures) for row in newest]
    clips = [(drawn.number, clip) for drawn in chosen for clip in drawn.clips if clip.frames]
    pictures.most = MAX_PICTURES // part
    for frame in range(MAX_FRAMES):
        for number, clip in sample(clips, pictures.room):
            pictures.of(number, clip, frame)
    pictures.most = 0
    text = _template().render(
        videos=[draw_video(drawn, pictures) for drawn in chosen],
        num_videos=len(videos),
        questions=asked,
        num_questions=len(questions),
        pictures=pictures.shown,
        num_frames=sum(len(clip.frames) for drawn in chosen for clip in drawn.kept),
        unreadable=pictures.unreadable,
        style=_inline("page.css"),
        script=_inline("page.js"),
    )
    # A file name that is no UTF-8 has lone surrogates, which no HTML file can hold.
    return text.encode("utf-8", "replace").decode("utf-8")


def write_report(memory_dir: str | os.PathLike, out: Path) -> Path:
    """Writes the page of a memory folder, whole or not at all; returns its path.

    Raises:
      UserError: if the folder is no memory or is damaged, or the page cannot be written.
    """
    views = [read_video(memory_dir, video_id) for video_id in store.list_videos(memory_dir)]
    write_whole(out, page(views, store.read_questions(memory_dir)).encode())
    return out
