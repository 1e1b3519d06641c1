"""The parts of the main screen, one per file; each draws itself from a View, line by line."""
