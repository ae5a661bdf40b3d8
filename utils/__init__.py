"""What every part needs: checkpoints, options, run folder, report, lock, processes, devices, errors, masks."""
