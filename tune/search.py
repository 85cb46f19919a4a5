"""Search the settings of one model of an experiment, with Ray Tune.

The program is triderm_dist/commands/search.py; from any folder: triderm search
"""

from triderm_dist.commands.search import start

if __name__ == "__main__":
    start()
