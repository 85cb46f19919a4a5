"""Make the index of WebDataset shards that others wrote, by one scan; then they train like packed ones.

The program is triderm_dist/commands/index.py; `triderm index` runs it from anywhere.
"""

from triderm_dist.commands.index import start

if __name__ == "__main__":
    start()
