"""Hostile and damaged inputs made from a seed, and a judgement of what every command does with them.

`python -m tests.hostile --seed 1 --count 300` prints the outcomes by kind. A case has a number: with the same seed,
`--only shards/7 --keep FOLDER` makes and runs it alone and keeps its files.
"""
