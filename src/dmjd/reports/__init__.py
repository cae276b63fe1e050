"""Reports: what a run did and how good it is, as one HTML file."""
