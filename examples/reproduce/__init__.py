"""The parts of reproduce_tables.py: what is measured, how, and the page that shows it."""
