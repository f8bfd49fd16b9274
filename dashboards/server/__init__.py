"""optuna-dashboard on a study's database, behind access control."""
