"""Search for the settings of one model around an experiment, with Ray Tune.

The program is triderm_dist/commands/search.py; `triderm search` runs it from anywhere.
"""

from triderm_dist.commands.search import start

if __name__ == "__main__":
    start()
