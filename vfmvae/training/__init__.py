"""Training without a model in it: checkpoints, logging, learning-rate schedules."""
