"""The search space of a study and Optuna's samplers and pruners for it."""
