"""Train each model once more on all labeled lesions, so that one network per model predicts instead of one per fold.

The program is triderm_dist/commands/refit.py; from any folder: triderm refit
"""

from triderm_dist.commands.refit import start

if __name__ == "__main__":
    start()
