"""Verify a folder of shards: checksums, index, every photo, and that plain `webdataset` reads the same samples.

The program is triderm_dist/commands/verify.py; from any folder: triderm verify
"""

from triderm_dist.commands.verify import start

if __name__ == "__main__":
    start()
