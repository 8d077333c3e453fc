"""Where streams come from: made worlds, EgoLife, and any folder of timed text."""
