"""Start ranks as `accelerate launch` does, with the exit status of the ranks, and forward signals to them.

The program is triderm_dist/commands/ranks.py; `triderm ranks` runs it from anywhere.
"""

from triderm_dist.commands.ranks import start

if __name__ == "__main__":
    start()
