"""Train one fold of one model and predict the lesions it never saw.

The program is triderm_dist/commands/train.py; `triderm train` runs it from anywhere.
"""

from triderm_dist.commands.train import start

if __name__ == "__main__":
    start()
