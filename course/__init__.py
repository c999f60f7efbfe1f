"""Lessons that are cut from the modules of tinyfm. Their command is `python -m course`."""
