"""The report of a run: figures in words, in plain-text tables and on one HTML page, read from the run's files alone."""
