"""Calibration: the pipeline is run, its transformer's calls recorded, and each block quantised for its inputs."""
