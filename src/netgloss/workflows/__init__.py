"""One file per verb: each puts the rooms below together. Orchestration only."""
