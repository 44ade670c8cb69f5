"""The project's own upkeep, and what its programs share. `python -m tools.soak` and so on."""
