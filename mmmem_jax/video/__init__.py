"""What the commands do: build a memory from video, watch a stream, ask, report."""
