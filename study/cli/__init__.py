"""The command `study`: one file a group of verbs; no logic, no Optuna or torch before a verb needs them."""
