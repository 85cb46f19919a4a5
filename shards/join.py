"""Join packed sets of one task, or take a part of one, without decoding photos.

The program is triderm_dist/commands/join.py; from any folder: triderm join
"""

from triderm_dist.commands.join import start

if __name__ == "__main__":
    start()
