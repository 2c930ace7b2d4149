"""The downstream evaluation: tasks and folds, fine-tuning and probing, results and statistics."""
