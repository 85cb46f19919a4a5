"""Predict lesions with every fold's model, the stacker and the ensemble of a run, and test-time augmentation.

The program is triderm_dist/commands/predict.py; from any folder: triderm predict
"""

from triderm_dist.commands.predict import start

if __name__ == "__main__":
    start()
