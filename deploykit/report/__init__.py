"""What a run found, for people: one self-contained HTML page."""
