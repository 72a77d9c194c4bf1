"""Pages that need nothing else, neither network nor server: of a run, and of its data."""
