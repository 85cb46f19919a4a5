"""Index WebDataset shards written by other programs in one scan, so that they can be used like packed ones.

The program is triderm_dist/commands/index.py; from any folder: triderm index
"""

from triderm_dist.commands.index import start

if __name__ == "__main__":
    start()
