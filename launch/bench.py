"""A minute that tells how fast this machine trains an experiment's network: lesions/s, MFU, memory, waiting for data.

The program is triderm_dist/commands/bench.py; `triderm bench` runs it from anywhere.
"""

from triderm_dist.commands.bench import start

if __name__ == "__main__":
    start()
