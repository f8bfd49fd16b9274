"""One database: Optuna's tables and three of our own. Never imports study or torch."""
