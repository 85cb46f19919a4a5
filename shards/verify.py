"""Check a folder of shards: checksums, index, every photo, that plain `webdataset` reads the same samples.

The program is triderm_dist/commands/verify.py; `triderm verify` runs it from anywhere.
"""

from triderm_dist.commands.verify import start

if __name__ == "__main__":
    start()
