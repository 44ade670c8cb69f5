"""Speed and size: ratios measured in one run. Each module is a program: `python -m bench.step`."""
