"""Entry points and spaces for hyperparameter search."""
