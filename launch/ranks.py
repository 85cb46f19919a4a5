"""Start ranks as `accelerate launch` does, return their exit code, and forward signals to them.

The program is triderm_dist/commands/ranks.py; from any folder: triderm ranks
"""

from triderm_dist.commands.ranks import start

if __name__ == "__main__":
    start()
