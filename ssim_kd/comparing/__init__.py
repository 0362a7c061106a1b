"""``ssim-kd compare``: arms x seeds of trainings, and statistics.

compare.py checks every training, study.py reads the YAML file, running.py trains, records.py keeps
the results, tuning.py tunes weights, statistics.py, analysis.py, tables.py and report.py write the
page.
"""
