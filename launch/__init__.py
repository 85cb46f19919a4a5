"""Entry points and files for running: experiments, Slurm, Kubernetes, Ray."""
