"""Quality, with its spread. Each module is a program: `python -m studies.recipe`."""
