"""Run all stages: pack, train all folds of all models, stack, predict with test-time augmentation, report.

The program is triderm_dist/commands/pipeline.py; from any folder: triderm pipeline
"""

from triderm_dist.commands.pipeline import start

if __name__ == "__main__":
    start()
