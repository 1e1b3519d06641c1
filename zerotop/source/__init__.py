"""Where a run's state comes from: a live hub, a hub behind SSH, or a recording. All fold into one RunState."""
