"""``ssim-kd compare``: arms x seeds of trainings, and statistics.

study.py reads the YAML file, running.py trains, records.py keeps the results, tuning.py tunes the
weight of each arm, statistics.py, tables.py and plots.py say what came out.
"""
