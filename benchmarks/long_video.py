"""A long video out of a short one: its pictures again and again, not coded anew."""

from pathlib import Path

import av


def repeat(source: str | Path, target: str | Path, times: int) -> Path:
    """Writes the video track of `source` `times` times over to `target` (.mp4, .mkv, ...)."""
    with av.open(str(target), "w") as out:
        written, end = None, 0
        for _ in range(times):
            with av.open(str(source)) as container:
                track = container.streams.video[0]
                written = written or out.add_stream_from_template(track)
                step = round(1 / (track.average_rate * track.time_base))
                packets = [packet for packet in container.demux(track) if packet.size]
                # Matroska does not tell when to decode the first ones.
                known = next((n for n, p in enumerate(packets) if p.dts is not None), 0)
                start = (packets[known].dts or 0) - known * step
                shift = end - start
                for number, packet in enumerate(packets):
                    packet.pts = None if packet.pts is None else packet.pts + shift
                    dts = start + number * step if packet.dts is None else packet.dts
                    packet.dts = dts + shift
                    packet.stream = written
                    end = packet.dts + step
                    out.mux(packet)
    return Path(target)
