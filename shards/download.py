"""Download the official files of MILK10k, checked and unpacked; stopped, the same command goes on where it was.

The program is triderm_dist/commands/download.py; `triderm download` runs it from anywhere.
"""

from triderm_dist.commands.download import start

if __name__ == "__main__":
    start()
