"""Train all folds of all models, then gather what each model says about lesions it never saw into oof.parquet.

The program is triderm_dist/commands/crossval.py; `triderm crossval` runs it from anywhere.
"""

from triderm_dist.commands.crossval import start

if __name__ == "__main__":
    start()
