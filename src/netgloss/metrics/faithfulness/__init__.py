"""Whether concepts carry the decision: importances, deletion, agreement of logits."""
