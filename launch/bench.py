"""Measure for a minute how fast this machine trains an experiment's network: lesions/s, MFU, memory, data wait.

The program is triderm_dist/commands/bench.py; from any folder: triderm bench
"""

from triderm_dist.commands.bench import start

if __name__ == "__main__":
    start()
