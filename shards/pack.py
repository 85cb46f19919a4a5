"""Pack a folder of photos with a table into WebDataset shards with an index.

The program is triderm_dist/commands/pack.py; from any folder: triderm pack
"""

from triderm_dist.commands.pack import start

if __name__ == "__main__":
    start()
