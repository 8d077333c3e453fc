"""A memory folder as one HTML page that needs nothing else: no font, no network, no other file.

The page shows every video's pyramid on a time line, its entity graph, and each question that was
asked with the search that answered it. `page` is pure: plain values in, text out; `write_report`
reads them from a memory folder. The page is bounded however large the memory is: of what is too
much, an even choice or the newest is drawn, and the page says so.
"""

from mmmem_jax.video.report.page import page, write_report
from mmmem_jax.video.report.views import (
    EntityView,
    EpisodeView,
    RelationView,
    VideoView,
    video_view,
)

__all__ = (
    "EntityView",
    "EpisodeView",
    "RelationView",
    "VideoView",
    "page",
    "video_view",
    "write_report",
)
