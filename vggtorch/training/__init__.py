"""Fine-tuning: one plain torch loop, its data, its checkpoints and its report."""
