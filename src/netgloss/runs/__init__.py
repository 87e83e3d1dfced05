"""The run folder: saved explainers, records of what was found, and how they read as verdicts."""
