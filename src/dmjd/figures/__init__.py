"""Figures of runs, encoders and evaluations. Pyplot and its global state are not used."""
