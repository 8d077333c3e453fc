"""A long video out of a short one: its pictures again and again, copied without coding them anew."""

from pathlib import Path

import av


def repeat(source: str | Path, target: str | Path, times: int) -> Path:
    """Writes the video track of `source` `times` times over to `target` (.mp4, .mkv, ...)."""
    with av.open(str(target), "w") as out:
        written, offset = None, 0
        for _ in range(times):
            with av.open(str(source)) as container:
                track = container.streams.video[0]
                written = written or out.add_stream_from_template(track)
                step = round(1 / (track.average_rate * track.time_base))
                end = offset
                for packet in container.demux(track):
                    if packet.dts is None:
                        continue
                    packet.stream = written
                    packet.pts = None if packet.pts is None else packet.pts + offset
                    packet.dts += offset
                    end = max(end, packet.dts + step)
                    out.mux(packet)
                offset = end
    return Path(target)
