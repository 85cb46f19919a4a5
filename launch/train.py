"""Train one fold of one model, and predict its held-out lesions.

The program is triderm_dist/commands/train.py; from any folder: triderm train
"""

from triderm_dist.commands.train import start

if __name__ == "__main__":
    start()
