"""The experiment of `moekern demo`: text, models, training, summary and report."""
