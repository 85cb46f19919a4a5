"""Look over this machine and an experiment: versions, devices, precision, batch, weights, data, and what is missing.

The program is triderm_dist/commands/doctor.py; `triderm doctor` runs it from anywhere.
"""

from triderm_dist.commands.doctor import start

if __name__ == "__main__":
    start()
