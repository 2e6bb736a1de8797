"""Timings and long checks, each a script that writes its lines into `results/`."""
