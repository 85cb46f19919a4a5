"""The whole way: pack, train all folds of all models, stack, predict with test-time augmentation, submission, report.

The program is triderm_dist/commands/pipeline.py; `triderm pipeline` runs it from anywhere.
"""

from triderm_dist.commands.pipeline import start

if __name__ == "__main__":
    start()
