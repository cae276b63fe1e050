"""Figures of runs, encoders and evaluations, as matplotlib ``Figure`` objects. Pyplot's global state is not used."""
