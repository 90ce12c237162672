"""The parts of reproduce_tables.py: measurements, models and datasets, and the page with the results."""
