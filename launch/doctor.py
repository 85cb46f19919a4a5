"""Check this machine and an experiment before a run: versions, devices, precision, batch, weights, data.

The program is triderm_dist/commands/doctor.py; from any folder: triderm doctor
"""

from triderm_dist.commands.doctor import start

if __name__ == "__main__":
    start()
