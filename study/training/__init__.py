"""Training one network under one data policy: knows torch, knows nothing of Optuna or databases."""
