"""Files that are not our own: looked through before any library sees them, then parsed by a process that can do little."""
